"""Every file of a run in turn, damaged: said by name and gone around, or refused; never trained or sampled from."""

import contextlib
import dataclasses
import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.training.small_run import (
    BEFORE,
    LATEST,
    Run,
    are_equal,
    arrays_of,
    checkpoints_of,
    finished_run,
    metrics_of,
    state_of,
    train_on,
)
from tinystories_jax.errors import UserError
from tinystories_jax.training import loop
from tinystories_jax.training.checkpoint import Checkpoints
from tinystories_jax.training.environment import describe_environment
from tinystories_jax.training.optim import make_optimizer
from tinystories_jax.training.restore import restore_params
from tinystories_jax.training.steps import init_state

FLIPS = 3  # positions of each file at which one bit is flipped


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with finished_run(tmp_path_factory.mktemp("damage")) as run:
        yield run


def damages(size: int, rng: random.Random) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Yields what can happen to a file of `size` bytes."""

    def flip(position: int) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            content = bytearray(path.read_bytes())
            content[position] ^= 1 << rng.randrange(8)
            path.write_bytes(content)

        return apply

    for position in sorted(rng.sample(range(size), min(size, FLIPS))):
        yield f"flip at {position}", flip(position)
    yield "halved", lambda path: path.write_bytes(path.read_bytes()[: size // 2])
    yield "emptied", lambda path: path.write_bytes(b"")
    yield "deleted", lambda path: path.unlink()


def cases(run: Run, tmp_path: Path, files: list[Path]) -> Iterator[tuple[str, Path, Path]]:
    """Yields what was done, the copy of the run, and the file in it that is damaged, for every file and damage."""
    rng = random.Random(0)
    for file in files:
        for number, (what, apply) in enumerate(damages(file.stat().st_size, rng)):
            copy = shutil.copytree(run.workdir, tmp_path / f"{file.name}{number}")
            damaged = copy / file.relative_to(run.workdir)
            apply(damaged)
            yield f"{file.relative_to(run.workdir)} {what}", copy, damaged
            shutil.rmtree(copy)


def start(run: Run, copy: Path) -> tuple[int, list[str]]:
    """Goes on with `copy`; returns after which update, in a state that is that update's, and the warnings."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        update, state = run.start(copy)
    assert are_equal(arrays_of(state), run.states[update])
    return update, [line for line in stderr.getvalue().splitlines() if line.startswith("warning: ")]


def start_outcome(run: Run, copy: Path) -> str:
    """Returns how training goes on without a sound latest checkpoint, or with one that is sound all the same."""
    update, warnings = start(run, copy)
    if update == LATEST:
        assert not warnings
        return "unharmed"
    (warning,) = warnings
    assert f"checkpoints/{LATEST}" in warning
    assert f"moved to {copy}/damaged/{LATEST}, going on from update {BEFORE}" in warning
    assert (copy / "damaged" / str(LATEST)).is_dir()
    assert checkpoints_of(copy) == [BEFORE]
    return "fell back"


def params_outcome(run: Run, copy: Path, step: str) -> str:
    try:
        params, meta = restore_params(copy, step)
    except UserError as error:
        (problem,) = error.problems
        assert f"{copy}/checkpoints/" in problem
        assert f"take another checkpoint, --step={BEFORE}; or rerun" in problem
        return "refused"
    found = arrays_of(params)
    assert are_equal(found, run.states[meta.update][1 : 1 + len(found)])  # after the micro-step
    return "unharmed"


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def test_damage_to_the_latest_checkpoint_is_found_and_the_one_before_taken(run, tmp_path, capfd):
    outcomes: Counter[tuple[str, str]] = Counter()
    of_part: dict[str, set[tuple[str, str]]] = {}
    checkpoint = run.workdir / "checkpoints" / str(LATEST)
    for _, copy, damaged in cases(run, tmp_path, files_of(checkpoint)):
        sampled = params_outcome(run, copy, "latest")
        trained = start_outcome(run, copy)
        outcomes[trained, sampled] += 1
        of_part.setdefault(damaged.relative_to(copy / "checkpoints").parts[1], set()).add((trained, sampled))
    # What is told as unharmed came back bit for bit: orbax writes files that it does not read.
    assert set(outcomes) == {("unharmed", "unharmed"), ("fell back", "refused"), ("fell back", "unharmed")}
    assert ("fell back", "unharmed") in of_part["training"]
    assert ("fell back", "unharmed") not in of_part["params"]
    assert sum(outcomes.values()) > 100
    assert outcomes["fell back", "refused"] > 20
    with capfd.disabled():
        print(f"\n{sum(outcomes.values())} damages to a checkpoint: {dict(outcomes)}")
    assert "Traceback" not in capfd.readouterr().err


def same_values(damaged: bytearray, content: bytes) -> bool:
    """Says whether nothing is lost: an e of an exponent has become an E, or the last of 17 digits another."""
    try:
        return json.loads(damaged) == json.loads(content)
    except ValueError:
        return False


def test_every_byte_of_the_meta_counts(run, tmp_path):
    copy = shutil.copytree(run.workdir, tmp_path / "run")
    path = copy / "checkpoints" / str(LATEST) / "meta" / "metadata"
    content = path.read_bytes()
    rng, harmless = random.Random(1), 0
    for position in rng.sample(range(len(content)), 200):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        if same_values(damaged, content):
            harmless += 1
            restore_params(copy, "latest")
            continue
        with pytest.raises(UserError, match="meta/metadata"):
            restore_params(copy, "latest")
    assert harmless < 10
    path.write_bytes(content)
    restore_params(copy, "latest")


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "environment.json", "tokenizer/tokenizer.json"])
def test_damage_to_a_file_beside_the_checkpoints_is_said_and_mended(run, tmp_path, name):
    for what, copy, damaged in cases(run, tmp_path, [run.workdir / name]):
        update, (warning,) = start(run, copy)
        assert update == LATEST
        assert str(damaged) in warning, what
        assert damaged.is_file()
        mended, files = damaged.read_bytes(), files_of(copy)
        # No later checkpoint knows of the mended rows, so that they are lost is said once more.
        assert len(start(run, copy)[1]) == name.endswith("jsonl")
        assert files_of(copy) == files
        assert damaged.read_bytes() == mended or name == "environment.json"
        if name == "metrics.jsonl":
            updates = [row["update"] for row in metrics_of(copy)]
            assert updates == sorted(set(updates))
            lost = sorted(set(range(1, LATEST + 1)) - set(updates))
            assert not lost or f"of updates {lost[0]}" in warning
            assert not lost or what.endswith(("emptied", "deleted")) or (copy / "damaged" / name).is_file()


def test_damage_to_the_config_is_said_and_mended(run, tmp_path):
    outcomes: Counter[int] = Counter()
    whole = (run.workdir / "config.json").read_bytes()
    for _, copy, damaged in cases(run, tmp_path, [run.workdir / "config.json"]):
        update, warnings = start(run, copy)
        # A field that a restart may change can have been changed: there is nothing to say.
        assert all(str(damaged) in warning for warning in warnings)
        outcomes[len(warnings)] += 1
        assert update == LATEST
        assert damaged.read_bytes() == whole
    assert set(outcomes) <= {0, 1}
    assert outcomes[1] >= 3


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", "null", "3", "[" * 100_000, '{"update": true}\n', '{"update": 1' + "0" * 5000 + "}\n", '"\\ud800"',
     '{"starts": 3, "xxh3_128": 3}', '{"update": 3, "text": "\\ud800"}\n' * 2, "\0" * 100,
     '{"format": 2, "xxh3_128": "0"}'],
)  # fmt: skip
@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "samples.jsonl", "environment.json", "config.json", "tokenizer/tokenizer.json",
     f"checkpoints/{LATEST}/meta/metadata", f"checkpoints/{LATEST}/params/_METADATA"],
)  # fmt: skip
def test_no_content_at_all_breaks_a_restart(run, tmp_path, name, content):
    copy = shutil.copytree(run.workdir, tmp_path / "run")
    (copy / name).write_text(content)
    update, (warning,) = start(run, copy)
    assert update == (BEFORE if name.startswith("checkpoints") else LATEST)
    assert name in warning or f"checkpoints/{LATEST}" in warning


def test_a_run_that_fell_back_comes_to_the_very_same_end(run, tmp_path):
    copy = shutil.copytree(run.workdir, tmp_path / "run")
    (copy / "checkpoints" / str(LATEST) / "params" / "manifest.ocdbt").unlink()
    train_on(run.config, copy)
    assert are_equal(state_of(run.config, copy), run.states[LATEST])
    assert metrics_of(copy) == metrics_of(run.workdir)
    assert checkpoints_of(copy) == checkpoints_of(run.workdir)


def test_without_a_sound_checkpoint_training_is_refused_and_nothing_moved(run, tmp_path):
    copy = shutil.copytree(run.workdir, tmp_path / "run")
    for update in (BEFORE, LATEST):
        (copy / "checkpoints" / str(update) / "meta" / "metadata").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint is sound; to train from the start") as caught:
        run.start(copy)
    for update in (BEFORE, LATEST):
        assert any(f"checkpoints/{update}" in problem for problem in caught.value.problems)
    assert checkpoints_of(copy) == [BEFORE, LATEST]
    assert not (copy / "damaged").exists()


def test_a_second_damage_to_the_same_update_keeps_both(run, tmp_path):
    copy = shutil.copytree(run.workdir, tmp_path / "run")
    for expected in ("6", "6.2"):
        (copy / "checkpoints" / str(LATEST) / "meta" / "metadata").write_text("{}")
        assert start(run, copy)[0] == BEFORE
        assert (copy / "damaged" / expected).is_dir()
        shutil.copytree(run.workdir / "checkpoints" / str(LATEST), copy / "checkpoints" / str(LATEST))


def test_the_best_checkpoint_is_not_guessed_without_the_newest_meta(run, tmp_path):
    copy = shutil.copytree(run.workdir, tmp_path / "run")
    assert restore_params(copy, "best")[1].update == LATEST
    (copy / "checkpoints" / str(LATEST) / "meta" / "metadata").write_text("{}")
    with pytest.raises(UserError, match=rf"checkpoints/{LATEST}.*take another checkpoint, --step={BEFORE};"):
        restore_params(copy, "best")
    assert restore_params(copy, str(BEFORE))[1].update == BEFORE


def test_another_environment_is_said_in_a_line_and_goes_on(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run.workdir, tmp_path / "run")
    now = describe_environment()
    other = dataclasses.replace(now, device="TPU v9", num_devices=8, versions={**now.versions, "jax": "9.9"})
    monkeypatch.setattr(loop, "describe_environment", lambda: other)
    update, (warning,) = start(run, copy)
    assert update == LATEST
    changes = f"device {now.device} -> TPU v9, devices {now.num_devices} -> 8, jax {now.versions['jax']} -> 9.9;"
    assert f"since update {LATEST} has changed: {changes}" in warning


def rewrite_meta(checkpoint: Path, change: Callable[[dict], None]) -> None:
    """Changes what stands beside the arrays, under a checksum that fits."""
    from tinystories_jax.training.meta import digest_of_meta

    path = checkpoint / "meta" / "metadata"
    values = json.loads(path.read_bytes())
    del values["xxh3_128"]
    change(values)
    path.write_text(json.dumps({**values, "xxh3_128": digest_of_meta(values)}))


def set_in(*keys: str, value: object) -> Callable[[dict], None]:
    def change(values: dict) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_in("config", "model", "d_model", value=-8), "model.d_model=-8"),
        (set_in("config", "model", "num_layers", value=10**9), "model.num_layers"),
        (set_in("config", "model", "vocab_size", value=10**12), "1000000000000 tokens"),
        (set_in("config", "model", "d_ff", value=1_000_000), "mlp"),
        (set_in("config", "schedule", "total_updates", value=-1), "-1 is no count"),
        (set_in("config", "schedule", "epoch_ends", value=3), "schedule"),
        (set_in("config", value=None), "config"),
        (set_in("tokenizer", value="x" * 100), "not JSON"),
        (set_in("update", value=-6), "-6 is no count"),
        (set_in("update", value=7), "holds the checkpoint of update 7"),
        (set_in("history", "evaluations", value=[{"update": 1}]), "loss"),
        (set_in("history", "seconds", value="long"), "no finite number"),
        (set_in("logs", value=[]), "AttributeError"),
        (set_in("leaves", value={"params": {}, "training": {}}), "nothing there"),
        (set_in("leaves", "params", value=3), "no table of arrays"),
        (set_in("format", value=9), "checkpoint format 9, this version reads"),
    ],
)
def test_absurd_values_are_refused_before_anything_is_allocated(run, tmp_path, change, said):
    copy = shutil.copytree(run.workdir, tmp_path / "run")
    rewrite_meta(copy / "checkpoints" / str(LATEST), change)
    with pytest.raises(UserError, match=said):
        restore_params(copy, "latest")


def test_a_state_that_does_not_fit_is_refused_by_the_names_of_its_arrays(run, tmp_path):
    copy = shutil.copytree(run.workdir, tmp_path / "run")
    rewrite_meta(copy / "checkpoints" / str(LATEST), set_in("leaves", "training", "micro_step", "dtype", value="int64"))
    with pytest.raises(UserError, match=r"micro_step: int64 \(\) there, int32 \(\) expected"):
        run.start(copy)
    assert checkpoints_of(copy) == [BEFORE, LATEST]


def test_a_checkpoint_without_checksums_is_of_an_older_version(run, tmp_path):
    copy = shutil.copytree(run.workdir, tmp_path / "run")
    path = copy / "checkpoints" / str(LATEST) / "meta" / "metadata"
    values = json.loads(path.read_bytes())
    del values["xxh3_128"], values["format"]
    path.write_text(json.dumps(values))
    for restore in (lambda: restore_params(copy, "latest"), lambda: run.start(copy)):
        with pytest.raises(UserError, match="made by an older version"):
            restore()


def test_weights_that_are_not_finite_are_neither_saved_nor_restored(run, tmp_path, monkeypatch):
    fresh = init_state(run.config, make_optimizer(run.config))
    state = fresh._replace(params=jax.tree.map(lambda leaf: leaf.at[0].set(np.nan), fresh.params))
    now = loop._meta(run.config, run.data)
    with Checkpoints(tmp_path, run.config) as checkpoints:
        with pytest.raises(UserError, match=r"update 1: nothing is saved: .* not finite"):
            checkpoints.save(state, dataclasses.replace(now, update=1))
        assert checkpoints.latest() is None
        with monkeypatch.context() as patch:
            patch.setattr(np, "isfinite", lambda values: np.ones_like(values, bool))
            checkpoints.save(state, dataclasses.replace(now, update=1))
            checkpoints.wait()
    with pytest.raises(UserError, match=r"checkpoints/1/params: .* holds values that are not finite"):
        restore_params(tmp_path)
