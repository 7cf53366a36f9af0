"""A run folder from a stranger: links, pipes, devices, files of a gigabyte. Refused or gone around, and in no time."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.test_fuzz import peak_megabytes, time_limit
from tests.training.small_run import BEFORE, LATEST, Run, are_equal, arrays_of, finished_run
from tinystories_jax.analysis.compare import compare
from tinystories_jax.analysis.report import write_report
from tinystories_jax.errors import UserError
from tinystories_jax.training.restore import restore_params
from tinystories_jax.training.run_folder import require_own_files

IN_CHECKPOINT = f"checkpoints/{LATEST}"
FILES = [
    *("config.json", "tokenizer/tokenizer.json", "environment.json", "metrics.jsonl", "samples.jsonl"),
    *(f"{IN_CHECKPOINT}/meta/metadata", f"{IN_CHECKPOINT}/params/manifest.ocdbt", f"{IN_CHECKPOINT}/params/_METADATA"),
]
WRITTEN = ["metrics.jsonl", "samples.jsonl", "tokenizer", "checkpoints", "tensorboard", "damaged"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with finished_run(tmp_path_factory.mktemp("hostile")) as run:
        yield run


def check_start(run: Run, copy: Path) -> int:
    """Goes on with `copy`; returns after which update, in a state that is that update's."""
    update, state = run.start(copy)
    assert are_equal(arrays_of(state), run.states[update])
    return update


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def make_gigabyte(path: Path) -> None:
    os.truncate(path, 2**30)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def outcome_of(act: Callable[[], object]) -> str:
    """Returns whether it was refused; it must not take long, nor much memory."""
    before = peak_megabytes()
    try:
        with time_limit(act):
            act()
        return "gone around"
    except UserError:
        return "refused"
    finally:
        assert peak_megabytes() - before < 400


@pytest.mark.parametrize("make", [make_pipe, make_device, make_gigabyte, make_folder])
@pytest.mark.parametrize("name", FILES)
def test_no_file_of_a_run_is_waited_for_or_read_without_end(run, tmp_path, name, make, tally: Counter[str]):
    copy = shutil.copytree(run.workdir, tmp_path / "run")
    make(copy / name)
    tally[f"report {outcome_of(lambda: write_report(copy))}"] += 1
    tally[f"compare {outcome_of(lambda: compare([copy, run.workdir]))}"] += 1
    sampled = outcome_of(lambda: restore_params(copy))
    tally[f"sample {sampled}"] += 1
    assert sampled == ("refused" if name.startswith("checkpoints") else "gone around")
    tally[f"train {outcome_of(lambda: check_start(run, copy))}"] += 1


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "samples.jsonl", "tokenizer", "checkpoints", "tensorboard", "damaged"]
)
@pytest.mark.parametrize("with_run", [True, False], ids=["run", "empty"])
def test_nothing_is_written_through_a_link_in_the_folder_of_a_run(run, tmp_path, name, with_run):
    copy = tmp_path / "run"
    shutil.copytree(run.workdir, copy) if with_run else copy.mkdir()
    precious = tmp_path / "precious"
    (copy / name).rename(precious) if (copy / name).exists() else precious.mkdir()
    (copy / name).symlink_to(precious)
    before = {path: path.read_bytes() for path in precious.rglob("*") if path.is_file()} | {precious: precious.stat()}
    with pytest.raises(UserError, match=rf"{copy}/{name}: is a link, .*--workdir"):
        run.start(copy)
    assert before == {path: path.read_bytes() for path in precious.rglob("*") if path.is_file()} | {
        precious: precious.stat()
    }


@pytest.mark.parametrize("name", ["tokenizer", "tensorboard", "damaged"])
def test_a_file_in_the_place_of_a_folder_of_the_run_is_to_be_moved_away(tmp_path, name):
    (tmp_path / name).write_text("precious")
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError) as caught:
        require_own_files(tmp_path)
    assert caught.value.problems == (
        f"{tmp_path / name}: is no folder, as a run has there; move it away, or give another --workdir",
        f"{tmp_path}/metrics.jsonl: is no regular file, as a run has there; move it away, or give another --workdir",
    )


@pytest.mark.parametrize("name", ["config.json", "environment.json", "report.html", "tokenizer/tokenizer.json"])
def test_a_file_that_is_written_whole_takes_the_place_of_a_link(run, tmp_path, name):
    copy = shutil.copytree(run.workdir, tmp_path / "run")
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(precious)
    assert check_start(run, copy) == LATEST
    write_report(copy)
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("name", [IN_CHECKPOINT, f"{IN_CHECKPOINT}/params", f"{IN_CHECKPOINT}/meta/metadata"])
def test_a_link_within_a_checkpoint_leads_nowhere(run, tmp_path, name):
    copy = shutil.copytree(run.workdir, tmp_path / "run")
    shutil.move(copy / name, tmp_path / "elsewhere")
    (copy / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"{name}: is neither a file nor a folder"):
        restore_params(copy, "latest")
    assert check_start(run, copy) == BEFORE
    assert (tmp_path / "elsewhere").exists()
