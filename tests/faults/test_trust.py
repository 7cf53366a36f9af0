"""Hostile files: whatever a cache, a tokenizer or a run folder holds is data, checked before use, within limits."""

import ast
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from tests.faults.place import ROOT, make_config, prepare, write_stories
from tests.test_cli import error_line, run_script
from tinystories_jax.config import Config
from tinystories_jax.data.cache import fingerprint_of
from tinystories_jax.data.files import hash_files
from tinystories_jax.data.prepare import find_cache
from tinystories_jax.data.tokenizer import load_tokenizer, parse_tokenizer, save_tokenizer
from tinystories_jax.errors import UserError

DEEP = "[" * 200_000
NESTED = '{"a":' * 900 + "1" + "}" * 900


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_stories(tmp_path / "train.txt", range(60))
    write_stories(tmp_path / "valid.txt", range(60, 75))
    return make_config(tmp_path)


def refusal(config: Config) -> str:
    """Returns why the data is refused, after less than 32 MB of memory."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            prepare(config)
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 3_000
    return str(caught.value)


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


STORED = ["tokens/train-*/manifest.json", "tokenizers/*/tokenizer.json", "tokenizers/*/meta.json"]


@pytest.mark.parametrize("pattern", STORED)
def test_a_file_of_a_gigabyte_is_refused_unread(tmp_path, config, pattern):
    prepare(config)
    path = only(tmp_path / "cache", pattern)
    os.truncate(path, 2**30)
    said = refusal(config)
    assert path.name in said
    assert "1,073,741,824 bytes" in said


@pytest.mark.parametrize("pattern", STORED)
def test_a_pipe_or_a_device_is_not_waited_for(tmp_path, config, pattern):
    prepare(config)
    path = only(tmp_path / "cache", pattern)
    path.unlink()
    os.mkfifo(path)
    assert f"{path} is not a regular file" in refusal(config)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert f"{path} is not a regular file" in refusal(config)


@pytest.mark.parametrize("pattern", ["tokens/train-*/tokens.bin", "tokens/train-*/story_hashes.bin"])
def test_numbers_in_a_pipe_or_a_device_are_refused(tmp_path, config, pattern):
    prepare(config)
    path = only(tmp_path / "cache", pattern)
    for make in (os.mkfifo, lambda place: place.symlink_to("/dev/zero")):
        path.unlink()
        make(path)
        assert f"{path.name} has 0 bytes" in refusal(config)


@pytest.mark.parametrize("pattern", STORED)
@pytest.mark.parametrize("content", [DEEP, NESTED, "1" * 10_000, '"\\ud800"', "[]", "null", "NaN", "\x00"])
def test_odd_json_is_refused_by_the_name_of_the_file(tmp_path, config, pattern, content):
    prepare(config)
    path = only(tmp_path / "cache", pattern)
    path.write_text(content)
    assert path.name in refusal(config)


def test_a_memory_of_hashes_of_a_gigabyte_is_ignored(tmp_path, config):
    prepare(config)
    memo = tmp_path / "cache" / "source_hashes.json"
    with memo.open("wb") as file:
        file.truncate(2**30)
    tracemalloc.start()
    hash_files(config.data.train_files, memo, remember=False)
    assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    tracemalloc.stop()


def seal(folder: Path, **changed: Any) -> None:
    """Writes the changes into the manifest, with the checksum that belongs to them."""
    path = folder / "manifest.json"
    values = {**json.loads(path.read_text()), **changed}
    others = {name: value for name, value in values.items() if name != "checksum"}
    path.write_text(json.dumps({**others, "checksum": fingerprint_of(others)}))


HOSTILE = [
    {"format_version": 99},
    {"format_version": 2.0},
    {"format_version": True},
    {"num_tokens": -1},
    {"num_tokens": 10**18},
    {"num_tokens": 10**300},
    {"num_tokens": 1e9},
    {"num_tokens": True},
    {"num_stories": -1},
    {"num_stories": 0},
    {"num_stories": 2**63},
    {"num_stories": 10**300},
    {"num_bytes": -5},
    {"num_bytes": 0},
    {"num_bytes": 10**300},
    {"num_bytes": None},
    {"dtype": "object"},
    {"dtype": "uint32"},
    {"dtype": "../../x"},
    {"tokenizer_sha256": "../../x"},
    {"tokenizer_sha256": 3},
    {"source": {}},
    {"source": {"split": "../../.."}},
    {"source": []},
    {"fingerprint": "x" * 1_000_000},
    {"tokens_checksum": "0" * 32},
    {"hashes_checksum": ""},
    {"report": {}},
    {"report": {"stories": 60}},
    {"report": []},
    {"extra": 1},
]


@pytest.mark.parametrize("changed", HOSTILE, ids=lambda changed: "{}={!r:.20}".format(*next(iter(changed.items()))))
def test_a_manifest_with_impossible_values_is_refused_though_its_checksum_is_right(tmp_path, config, changed):
    folder = prepare(config).train.folder
    seal(folder, **changed)
    assert str(folder) in refusal(config)


@pytest.mark.parametrize(
    "changed", [{"stories": -1}, {"words": "many"}, {"words": None}, {"unknown": 1}, {"words": 1.5}]
)
def test_a_report_with_impossible_values_is_refused(tmp_path, config, changed):
    cache = prepare(config).train
    seal(cache.folder, report={**cache.manifest.report, **changed})
    assert "manifest.json has " in refusal(config)


def test_ids_beyond_the_vocabulary_are_refused_though_the_checksum_is_right(tmp_path, config):
    cache = prepare(config).train
    tokens = np.array(cache.tokens)
    tokens[7] = 300
    (cache.folder / "tokens.bin").write_bytes(tokens.tobytes())
    seal(cache.folder, tokens_checksum=xxhash.xxh3_128(tokens.tobytes()).hexdigest())
    assert "tokens.bin holds ID 300, but its tokenizer has 300 tokens" in refusal(config)
    assert "tokens.bin holds ID 300" in error_line(run_script("prepare", *flags(tmp_path)), after_log=True)


@pytest.mark.parametrize("fingerprint", ["../../../../etc", "/etc/passwd", "", "x\x00y", "0" * 63, "A" * 64, "0" * 65])
def test_a_fingerprint_that_would_be_a_path_is_refused(config, fingerprint):
    tokenizer = prepare(config).tokenizer
    with pytest.raises(UserError, match="is no SHA-256"):
        find_cache(config.data, "train", fingerprint, tokenizer)


def test_links_in_a_hostile_run_are_never_written_through(tmp_path, config):
    tokenizer = prepare(config).tokenizer
    precious = tmp_path / "precious"
    precious.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / "tokenizer.json").symlink_to(precious)
    save_tokenizer(tokenizer, run)
    assert load_tokenizer(run) == tokenizer
    assert [path.name for path in run.iterdir()] == ["tokenizer.json"]
    (run / ".tokenizer.json.building").symlink_to(precious)
    with pytest.raises(UserError, match="cannot write"):
        save_tokenizer(tokenizer, run)
    assert precious.read_text() == "precious"


def test_a_link_in_place_of_the_memory_of_hashes_is_not_written_through(tmp_path, config, monkeypatch):
    monkeypatch.setattr("tinystories_jax.data.files._SETTLED_SECONDS", 0.0)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    memo = tmp_path / "memo.json"
    memo.symlink_to(precious)
    hash_files(config.data.train_files, memo)
    assert precious.read_text() == "precious"
    assert not memo.is_symlink()


def change(values: Any, where: tuple[str, ...], value: Any) -> str:
    inner = values
    for name in where[:-1]:
        inner = inner[name]
    inner[where[-1]] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        # The first two make the library's Rust code panic.
        (("normalizer",), {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        (("model", "continuing_subword_prefix"), "########"),
        (("model", "merges"), [["x", "y"]]),
        (("model", "merges"), 3),
        (("model", "vocab"), {"a": 2**31}),
        (("model", "vocab"), {"a": -1}),
        (("model", "vocab"), {"a": 2**64}),
        (("model", "type"), "../../x"),
        (("added_tokens",), [{"id": 4_000_000_000, "content": "x", "special": True}]),
        (("pre_tokenizer",), {"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": []}]}),
        (("post_processor",), {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}),
    ],
)
def test_a_hostile_tokenizer_is_refused(config, where, value):
    text = change(json.loads(prepare(config).tokenizer.json), where, value)
    with pytest.raises(UserError, match=r"hostile\.json") as caught:
        parse_tokenizer(text, "hostile.json")
    assert "\n" not in str(caught.value)


def flags(folder: Path) -> list[str]:
    return [
        *("--config=configs/quickstart.py", "--config.data.source=files", "--config.data.sequence_length=16"),
        f"--config.data.train_files={folder / 'train.txt'}",
        f"--config.data.valid_files={folder / 'valid.txt'}",
        f"--config.data.cache_dir={folder / 'cache'}",
        "--config.tokenizer.vocab_size=300",
    ]


def test_a_given_tokenizer_of_a_gigabyte_is_refused_by_the_command(tmp_path, config):
    large = tmp_path / "tokenizer.json"
    with large.open("wb") as file:
        file.truncate(2**30)
    line = error_line(run_script("prepare", *flags(tmp_path), f"--config.tokenizer.path={large}"))
    assert f"{large} has 1,073,741,824 bytes" in line


def names_in(tree: ast.AST) -> set[str]:
    """Returns the modules that are imported, the functions called and the arguments given by name."""
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {ast.unparse(call.func) for call in calls}
    return imported | called | {f"{keyword.arg}=" for call in calls for keyword in call.keywords}


def test_nothing_is_unpickled_and_no_code_comes_with_data():
    sources = [path for folder in ("tinystories_jax", "scripts") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 30
    suspicious = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "torch", "yaml", "np.load"}
    suspicious |= {"eval", "exec", "compile", "allow_pickle=", "trust_remote_code="}
    # The peer that the benchmark runs beside us is PyTorch; it reads arrays that the benchmark has just written.
    known = {"tinystories_jax/analysis/peer.py": {"torch", "np.load"}}
    found = {str(path.relative_to(ROOT)): names_in(ast.parse(path.read_text())) & suspicious for path in sources}
    assert {name: names for name, names in found.items() if names} == known
