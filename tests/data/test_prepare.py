"""Preparing data: builds what is missing, reuses the rest, and mixes up nothing."""

import contextlib
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinystories_jax.config import Config, resolve
from tinystories_jax.data import cache as cache_module
from tinystories_jax.data.folders import rebuild_command
from tinystories_jax.data.prepare import PreparedData, count_shared_stories, find_data, prepare_data
from tinystories_jax.data.stories import END_OF_STORY
from tinystories_jax.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe
from tinystories_jax.data.tokenizer_store import prepare_tokenizer
from tinystories_jax.errors import UserError
from tinystories_jax.lock import locked

ROOT = Path(__file__).parents[2]


WITHOUT_FILES = {"data__train_files": "", "data__valid_files": ""}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--config", "c.py", "--workdir=w", "--config.seed=1"], "--config c.py --config.seed=1"),
        (["--config=c.py", "--config.model.remat", "--workdir=w"], "--config=c.py --config.model.remat"),
        (["-config", "c.py", "--nodoctor"], "-config c.py"),
        (["--config=c.py", "--config.seed", "1", "--workdir", "w"], "--config=c.py --config.seed 1"),
        ([], "--config CONFIG"),
    ],
)
def test_the_command_that_builds_again_has_what_this_one_says_of_the_config(monkeypatch, given, told):
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    assert rebuild_command() == f"python scripts/prepare.py {told} --rebuild"


def story(index: int) -> str:
    return f"Once upon a time there was a cat. The cat number {index} saw {index * 3} red balls, an owl and the moon."


def write_stories(path: Path, indices: range) -> str:
    path.write_text("".join(f"{story(index)}\n{END_OF_STORY}\n" for index in indices))
    return str(path)


class Workplace:
    """A folder with two splits of stories, which share 30, and a log of what prepare_data says."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lines: list[str] = []
        self.overrides: dict[str, Any] = {
            "data.source": "files",
            "data.train_files": write_stories(folder / "train.txt", range(400)),
            "data.valid_files": write_stories(folder / "valid.txt", range(370, 450)),
            "data.cache_dir": str(folder / "cache"),
            "tokenizer.vocab_size": 300,
        }

    def config(self, **overrides: Any) -> Config:
        config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
        changed = {name.replace("__", "."): value for name, value in overrides.items()}
        config.update_from_flattened_dict({**self.overrides, **changed})
        return resolve(config)

    def prepare(self, *, rebuild: bool = False, **overrides: Any) -> PreparedData:
        self.lines.clear()
        return prepare_data(self.config(**overrides), rebuild=rebuild, show_progress=False, log=self.lines.append)

    def folders(self, kind: str) -> list[Path]:
        return sorted((self.folder / "cache" / kind).iterdir())

    def said(self, words: str) -> bool:
        return any(words in line for line in self.lines)


@pytest.fixture
def place(tmp_path) -> Workplace:
    return Workplace(tmp_path)


def test_builds_what_is_missing_then_reuses_it(place):
    built = place.prepare()
    assert place.said("tokenizer: trained")
    assert place.said("train: wrote")
    assert place.said("validation: wrote")
    files = {path: path.stat().st_mtime_ns for path in (place.folder / "cache").glob("to*/**/*")}
    assert len(files) == 3 + 2 * 4

    start = time.perf_counter()
    reused = place.prepare()
    assert time.perf_counter() - start < 1
    assert place.said("tokenizer: reusing")
    assert place.said("train: reusing")
    assert place.said("validation: reusing")
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert reused.tokenizer == built.tokenizer
    assert reused.report == built.report
    assert "stories shared by train and validation: " in built.report
    assert np.array_equal(reused.train.tokens, built.train.tokens)


def test_splits_are_what_the_config_names(place):
    data = place.prepare()
    assert (data.train.manifest.num_stories, data.valid.manifest.num_stories) == (400, 80)
    assert data.tokenizer.decode(data.valid.tokens).split(END_OF_STORY)[0] == story(370)
    assert data.train.manifest.tokenizer_sha256 == data.tokenizer.sha256


def test_shared_stories_are_counted_and_reported(place, monkeypatch):
    data = place.prepare()
    assert count_shared_stories(data.train, data.valid) == count_shared_stories(data.valid, data.train) == 30
    assert count_shared_stories(data.train, data.train) == 400
    assert "30" in data.report
    # In many small pieces as in one.
    monkeypatch.setattr("tinystories_jax.data.prepare._HASHES_PER_CHUNK", 7)
    assert count_shared_stories(data.train, data.valid) == 30
    assert count_shared_stories(data.valid, data.valid) == 80


def test_max_stories_limits_the_training_split_alone(place):
    whole = place.prepare()
    limited = place.prepare(data__max_stories=20)
    assert limited.train.manifest.num_stories == 20
    assert limited.valid.manifest.num_stories == 80
    assert limited.train.folder != whole.train.folder


def test_another_tokenizer_gets_its_own_caches(place):
    one, other = place.prepare(), place.prepare(tokenizer__vocab_size=280)
    assert one.tokenizer != other.tokenizer
    assert {one.train.folder, one.valid.folder}.isdisjoint({other.train.folder, other.valid.folder})
    assert len(place.folders("tokenizers")) == 2
    assert len(place.folders("tokens")) == 4
    assert place.prepare().train.folder == one.train.folder


def test_changed_stories_are_noticed(place):
    before = place.prepare()
    write_stories(place.folder / "train.txt", range(1, 401))
    after = place.prepare()
    assert after.train.folder != before.train.folder
    assert after.valid.manifest.num_stories == before.valid.manifest.num_stories


def test_stories_that_change_while_they_are_read_are_no_cache(place, monkeypatch):
    write_tokens = cache_module._write_tokens

    def write_and_change(*arguments):
        counts = write_tokens(*arguments)
        with (place.folder / "train.txt").open("a") as file:
            file.write("One more.")
        return counts

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_write_tokens", write_and_change)
        with pytest.raises(UserError, match=r"train.txt: changed while it was read; start again"):
            place.prepare()
    assert place.prepare().train.manifest.report["raw_stories"] > 0


def test_nobody_has_to_read_what_preparing_says(tmp_path):
    command = [sys.executable, "scripts/prepare.py", "--config=configs/quickstart.py"]
    flags = [f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.data.max_stories=50"]
    flags += ["--config.tokenizer.vocab_size=300"]
    with subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        process.stderr.close()
        assert process.wait(timeout=120) == 0
    assert len(list((tmp_path / "cache" / "tokens").glob("*/manifest.json"))) == 2


def test_the_script_shows_the_report_also_where_all_is_there(tmp_path):
    command = [sys.executable, "scripts/prepare.py", "--config=configs/quickstart.py"]
    flags = [f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.data.max_stories=50"]
    flags += ["--config.tokenizer.vocab_size=300"]
    for said in ("train: wrote", "train: reusing"):
        result = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)
        assert said in result.stderr
        assert "stories kept" in result.stderr
        assert "stories shared by train and validation: " in result.stderr
        assert result.stdout.startswith("tokenizer   300 tokens")


def test_rebuild_replaces_everything_with_the_same(place):
    before = place.prepare()
    (before.train.folder / "tokens.bin").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"tokens\.bin has 7 bytes.*scripts/prepare\.py .*--rebuild"):
        place.prepare()
    after = place.prepare(rebuild=True)
    assert place.said("tokenizer: trained")
    assert place.said("validation: wrote")
    assert after.train.manifest == before.train.manifest
    assert len(place.folders("tokens")) == 2


@pytest.mark.parametrize("file", ["tokenizer.json", "meta.json"])
def test_damaged_stored_tokenizer_is_refused(place, file):
    place.prepare()
    (folder,) = place.folders("tokenizers")
    (folder / file).write_text("{")
    with pytest.raises(UserError, match=r"stored tokenizer .* is damaged .*--rebuild"):
        place.prepare()
    (folder / file).unlink()
    with pytest.raises(UserError, match=r"stored tokenizer .* is damaged .*--rebuild"):
        place.prepare()


def test_foreign_stored_tokenizer_is_refused(place):
    place.prepare()
    (folder,) = place.folders("tokenizers")
    save_tokenizer(train_bpe([story(0)], vocab_size=270), folder)
    with pytest.raises(UserError, match=r"SHA-256 of tokenizer\.json [0-9a-f]{64}, expected [0-9a-f]{64}"):
        place.prepare()
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "fingerprint": "ff"}))
    with pytest.raises(UserError, match="has fingerprint ff, expected"):
        place.prepare()


def test_given_tokenizer_is_used_as_it_is(place):
    path = save_tokenizer(train_bpe([story(0), "Other text."], vocab_size=270), place.folder / "given")
    data = place.prepare(tokenizer__path=str(path))
    assert data.tokenizer == load_tokenizer(path)
    assert place.said("holds only 270 of the 300 tokens asked")
    assert not (place.folder / "cache" / "tokenizers").exists()
    with pytest.raises(
        UserError, match=r"has 270 tokens, more than tokenizer\.vocab_size=260; give --config"
    ) as caught:
        place.prepare(tokenizer__path=str(path), tokenizer__vocab_size=260)
    assert str(path) in str(caught.value)


def test_tokenizer_of_other_text(place):
    (place.folder / "other.txt").write_text("Der Hund und die Katze sehen den Mond.\n" * 3)
    config = place.config(tokenizer__source="files", tokenizer__train_files=str(place.folder / "other.txt"))
    other = prepare_tokenizer(config.data, config.tokenizer, show_progress=False, log=place.lines.append)
    assert place.said("the corpus fills only")
    assert other.token_id(" Hund") is not None
    assert other.token_id(" cat") is None


@pytest.mark.parametrize("split", ["train", "valid"])
def test_split_without_stories_is_refused(place, split):
    (place.folder / f"{split}.txt").write_text("\n")
    with pytest.raises(UserError, match="no story"):
        place.prepare()


def test_bundled_sample_needs_no_files(place):
    data = place.prepare(**WITHOUT_FILES, data__source="sample", data__max_stories=200)
    assert data.train.manifest.num_stories == 200
    assert data.valid.manifest.num_stories > 0
    assert data.tokenizer.vocab_size == 300


def test_data_is_prepared_without_jax():
    program = (
        "import sys, tinystories_jax.data.prepare; print(*({'jax', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_missing_files_of_both_splits_are_reported_together_before_anything_is_built(place):
    with pytest.raises(UserError) as caught:
        place.prepare(data__train_files="no_train.txt", data__valid_files="no_valid.txt")
    assert ["no_train" in line for line in caught.value.problems] == [True, False]
    assert ["no_valid" in line for line in caught.value.problems] == [False, True]
    assert not (place.folder / "cache" / "tokenizers").exists()


@pytest.mark.parametrize("first_builder", ["finishes", "dies"])
@pytest.mark.parametrize("kind", ["tokenizers", "tokens"])
def test_of_two_builders_one_builds_and_the_other_waits(place, kind, first_builder):
    built = place.prepare()
    folder = place.folders("tokenizers")[0] if kind == "tokenizers" else built.train.folder
    folder.rename(place.folder / "elsewhere")
    left_behind = folder.with_name(f".{folder.name}.building-of-a-killed-one")
    left_behind.mkdir()
    with contextlib.ExitStack() as first:
        first.enter_context(locked(folder.with_name(f".{folder.name}.lock"), when_held=print))

        def log(line: str) -> None:
            place.lines.append(line)
            if line == f"waiting for {owner}, which builds {folder}":
                if first_builder == "finishes":
                    (place.folder / "elsewhere").rename(folder)
                first.close()

        owner = folder.with_name(f".{folder.name}.lock").read_text().strip()
        place.lines.clear()
        data = prepare_data(place.config(), show_progress=False, log=log)
    made = "trained" if kind == "tokenizers" else "wrote"
    assert place.said(f"{made if first_builder == 'dies' else 'reusing'} {folder}")
    assert not place.said(f"{made if first_builder == 'finishes' else 'reusing'} {folder}")
    assert data.train.manifest == built.train.manifest
    assert not left_behind.exists()
    assert list((place.folder / "cache").rglob(".*")) == []


def test_what_a_builder_left_that_was_killed_when_it_was_done_goes(place):
    built = place.prepare()
    left = [folder.with_name(f".{folder.name}.lock") for folder in (place.folders("tokenizers")[0], built.train.folder)]
    left.append(built.valid.folder.with_name(f".{built.valid.folder.name}.lock"))
    for path in left:
        path.touch()
    built.valid.folder.with_name(f".{built.valid.folder.name}.building-1").mkdir()
    place.prepare()
    assert place.said("train: reusing")
    assert list((place.folder / "cache").rglob(".*")) == []


def files_below(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_what_is_prepared_is_found_and_nothing_is_written(place, monkeypatch):
    # Files this young are otherwise not remembered.
    monkeypatch.setattr("tinystories_jax.data.files._SETTLED_SECONDS", 0.0)
    prepared = place.prepare()
    (place.folder / "cache" / "source_hashes.json").unlink()
    before = files_below(place.folder)
    found = find_data(place.config())
    assert found is not None
    assert (found.tokenizer, found.report) == (prepared.tokenizer, prepared.report)
    assert (found.train.folder, found.valid.folder) == (prepared.train.folder, prepared.valid.folder)
    assert np.array_equal(found.train.tokens, prepared.train.tokens)
    assert files_below(place.folder) == before


@pytest.mark.parametrize("missing", ["everything", "tokenizer", "train", "validation", "those of other stories"])
def test_what_is_not_prepared_is_not_found_and_not_built(place, missing):
    if missing != "everything":
        prepared = place.prepare()
        folders = {"tokenizer": place.folders("tokenizers")[0], "train": prepared.train.folder}
        folders["validation"] = prepared.valid.folder
        if missing in folders:
            folders[missing].rename(place.folder / "elsewhere")
        else:
            write_stories(place.folder / "valid.txt", range(10))
    before = files_below(place.folder)
    assert find_data(place.config()) is None
    assert files_below(place.folder) == before


def test_a_given_tokenizer_and_its_caches_are_found(place):
    path = save_tokenizer(train_bpe([story(0), "Other text."], vocab_size=270), place.folder / "given")
    assert find_data(place.config(tokenizer__path=str(path))) is None
    prepared = place.prepare(tokenizer__path=str(path))
    found = find_data(place.config(tokenizer__path=str(path)))
    assert found is not None
    assert found.train.manifest == prepared.train.manifest


def test_finding_refuses_what_is_damaged_or_cannot_be_read(place):
    with pytest.raises(UserError, match="matches no file"):
        find_data(place.config(data__train_files="no_train.txt"))
    (place.prepare().train.folder / "tokens.bin").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"tokens\.bin has 7 bytes.*--rebuild"):
        find_data(place.config())


def test_the_hub_is_not_asked_for_what_is_not_prepared(place, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert find_data(place.config(**WITHOUT_FILES, data__source="hub")) is None
