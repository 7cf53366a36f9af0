"""What /proc/cpuinfo says, on x86, on Arm, and where there is none."""

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinystories_jax.processor import describe_processor, multiplies_bfloat16

# Cut to what tells them apart; the second processor of each must not be read.
X86 = "processor\t: 0\nmodel name\t: A Chip: 3 GHz\nflags\t: fpu avx2 {}\nbugs\t:\n\nmodel name\t: other\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\nCPU part\t: 0xd40\n\nprocessor\t: 1\nCPU part\t: 0xd41\n"


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    describe_processor.cache_clear()
    yield
    describe_processor.cache_clear()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (X86.format("avx512f avx512_bf16"), True),
        (X86.format("amx_bf16 amx_tile"), True),
        (X86.format("avx512f"), False),
        (ARM.format("bf16 i8mm"), True),
        (ARM.format("i8mm"), False),
        ("", False),
    ],
)
def test_instructions_for_bfloat16_are_seen(monkeypatch, text, expected):
    monkeypatch.setattr(Path, "read_text", lambda path, **more: text)
    assert multiplies_bfloat16() is expected


def test_the_first_processor_is_described(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path, **more: X86.format("avx512f"))
    assert describe_processor()["model name"] == "A Chip: 3 GHz"
    assert describe_processor()["flags"] == "fpu avx2 avx512f"


def test_a_system_without_such_a_file_has_no_description(monkeypatch):
    def read(path: Path, **more: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", read)
    assert describe_processor() == {}
    assert not multiplies_bfloat16()


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux has /proc/cpuinfo")
def test_this_processor_is_described():
    assert describe_processor().keys() & {"flags", "Features"}
