"""What the system says of this machine's processor."""

import functools
from pathlib import Path

_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is Arm's


@functools.cache
def describe_processor() -> dict[str, str]:
    """Returns the fields of the first processor in /proc/cpuinfo; none where the system has no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = [line.partition(":") for line in text.split("\n\n")[0].splitlines()]
    return {name.strip(): value.strip() for name, _, value in pairs}


def multiplies_bfloat16() -> bool:
    """Returns whether the processor has instructions for matmuls in bf16."""
    fields = describe_processor()
    return not _BFLOAT16.isdisjoint([*fields.get("flags", "").split(), *fields.get("Features", "").split()])
