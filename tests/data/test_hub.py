"""Stories from a Hub: the product's own function, in a process that knows no Hub but a stand-in on the loopback."""

import contextlib
import json
import multiprocessing
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.data.hub_stand_in import REVISION, HubDataset, hub_environment, hub_stand_in
from tinystories_jax.data import hub

NAME = "roneneldan/TinyStories"
TRAIN = [f"Story {number}: once there was a cat who had {number} mice." for number in range(5_000)]
VALIDATION = [f"Story {number}: a dog." for number in range(300)]
STORIES = HubDataset({"default": {"train": TRAIN, "validation": VALIDATION}})

SCRIPT = """
import dataclasses, json, sys
from tinystories_jax.data import hub, stories
from tinystories_jax.errors import UserError
source = json.loads(sys.argv[1])
hub.FIRST_STORY_SECONDS, hub.NEXT_STORY_SECONDS = json.loads(sys.argv[2])
report, read, error = stories.StoryReport(), [], None
try:
    for story in stories.iter_stories(stories.StorySource(kind="hub", **source), report, stories.SeenStories()):
        read.append(story)
except UserError as caught:
    error = str(caught)
print(json.dumps({"stories": read, "report": dataclasses.asdict(report), "error": error}))
"""


def test_a_child_that_dies_within_a_message_has_ended():
    receiver, sender = multiprocessing.Pipe(duplex=False)
    os.write(sender.fileno(), struct.pack("!i", 1000) + b"[")
    sender.close()
    with receiver, pytest.raises(EOFError):
        next(hub._listen(receiver, {}))


# Reads a story under a lock, and says what files the reading process has open.
LOCK_SCRIPT = """
import json, os, sys
from pathlib import Path
from tinystories_jax.data import stories
from tinystories_jax.lock import locked
source = stories.StorySource(kind="hub", **json.loads(sys.argv[1]))
with locked(Path("lock").absolute(), when_held=print):
    reading = stories.iter_stories(source, stories.StoryReport(), stories.SeenStories())
    next(reading)
    (child,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    print(*(os.readlink(path) for path in Path(f"/proc/{child}/fd").iterdir()), sep="\\n")
    reading.close()
"""


def start(
    endpoint: str,
    home: Path,
    *,
    script: str = SCRIPT,
    patience: tuple[float, float] = (hub.FIRST_STORY_SECONDS, hub.NEXT_STORY_SECONDS),
    **source: Any,
) -> subprocess.Popen[str]:
    source = {"split": "train", "hub_name": NAME, "hub_revision": REVISION, **source}
    home.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(source), json.dumps(patience)],
        env={**hub_environment(endpoint, home), "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    with process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    # No progress bar, no log of the libraries.
    assert stderr == ""
    return json.loads(stdout.splitlines()[-1])


def read(endpoint: str, home: Path, **source: Any) -> dict[str, Any]:
    return finish(start(endpoint, home, **source))


def assert_names_the_ways_out(error: str, endpoint: str) -> None:
    assert endpoint in error
    assert "--config.data.source=files" in error
    assert "--config.data.source=sample" in error
    assert "\n" not in error


def test_all_shards_arrive_in_order_with_the_size_of_the_metadata(tmp_path):
    with hub_stand_in({NAME: STORIES}) as endpoint:
        # A folder of that name is no data set of the Hub.
        (tmp_path / NAME).mkdir(parents=True)
        (tmp_path / NAME / "train.txt").write_text("A story from the wrong place.")
        processes = start(endpoint, tmp_path), start(endpoint, tmp_path, split="validation", max_stories=7)
        train, validation = map(finish, processes)
    assert train["error"] is None
    assert train["stories"] == TRAIN
    report = train["report"]
    assert (report["raw_stories"], report["stories"], report["position"], report["size"]) == (5_000,) * 4
    assert report["utf8_bytes"] == sum(len(story) for story in TRAIN)
    assert validation["stories"] == VALIDATION[:7]
    assert (validation["report"]["position"], validation["report"]["size"]) == (7, 300)


def test_subset_and_null_rows(tmp_path):
    dataset = HubDataset({"small-v1": {"train": ["one", None, " two "]}, "large-v1": {"train": ["three"]}})
    with hub_stand_in({"Salesforce/wikitext": dataset}) as endpoint:
        subsets = ("small-v1", "", "medium-v1")
        processes = [start(endpoint, tmp_path, hub_name="Salesforce/wikitext", hub_subset=name) for name in subsets]
        small, none, wrong = map(finish, processes)
    assert small["stories"] == ["one", "two"]
    assert small["report"]["dropped_empty"] == 1
    for result in (none, wrong):
        assert "small-v1" in result["error"]
        assert "large-v1" in result["error"]


def test_what_the_hub_does_not_have_is_named(tmp_path):
    datasets = {
        NAME: STORIES,
        "no/text": HubDataset({"default": {"train": ["a"]}}, column="body"),
        "gated/data": HubDataset({"default": {"train": ["a"]}}, gated=True),
    }
    cases: dict[str, dict[str, Any]] = {
        "Revision '" + "0" * 40: {"hub_revision": "0" * 40},
        "'nobody/nothing' doesn't exist": {"hub_name": "nobody/nothing"},
        "no column `text`, only body": {"hub_name": "no/text"},
        "is a gated dataset": {"hub_name": "gated/data"},
        "Available splits": {"hub_name": "no/text", "split": "validation"},
    }
    with hub_stand_in(datasets) as endpoint:
        processes = [start(endpoint, tmp_path, **source) for source in cases.values()]
        for expected, result in zip(cases, map(finish, processes), strict=True):
            assert result["stories"] == []
            assert expected in result["error"]


def test_a_hub_out_of_reach_is_named_in_time(tmp_path):
    # A promise of 35 seconds: patience, and starting Python twice, which takes seconds on a busy machine.
    assert hub.FIRST_STORY_SECONDS <= 25
    faults = {
        "no hub": ("not a hub", "/"),
        "error": ("error", "/"),
        "silence": ("silence", "/"),
        "cut": ("cut", "/"),
        "stall": ("silence", "/tree/"),
    }
    started, results = time.monotonic(), {}
    with contextlib.ExitStack() as stack:
        processes = {}
        for name, (fault, path) in faults.items():
            endpoint = stack.enter_context(hub_stand_in({NAME: STORIES}, fault=fault, fault_path=path))
            processes[name] = endpoint, start(endpoint, tmp_path / name, patience=(6.0, 60.0))
        with hub_stand_in({}) as closed:
            pass
        processes["refused"] = closed, start(closed, tmp_path / "refused")
        for name, (endpoint, process) in processes.items():
            results[name] = finish(process)
            assert results[name]["stories"] == []
            assert_names_the_ways_out(results[name]["error"], endpoint)
    assert time.monotonic() - started < 6 + (35 - hub.FIRST_STORY_SECONDS) * 2
    assert "500" in results["error"]["error"]
    assert "refused" in results["refused"]["error"]
    assert "no answer for 6 seconds" in results["stall"]["error"]


def test_an_outage_between_two_shards_is_an_error_not_a_short_corpus(tmp_path):
    with contextlib.ExitStack() as stack:
        processes = {}
        for fault in ("error", "silence", "cut"):
            endpoint = stack.enter_context(hub_stand_in({NAME: STORIES}, fault=fault, fault_path="train-00002"))
            processes[endpoint] = start(endpoint, tmp_path / fault, patience=(25.0, 3.0))
        for endpoint, process in processes.items():
            result = finish(process)
            assert 2_000 <= len(result["stories"]) <= 2_500
            assert result["stories"] == TRAIN[: len(result["stories"])]
            assert_names_the_ways_out(result["error"], endpoint)


def test_a_cached_copy_of_another_time_is_no_substitute(tmp_path):
    # What `datasets` takes when the Hub fails, if it is let: the latest copy that it has prepared, of any revision.
    prepare = "import datasets, sys; datasets.load_dataset(sys.argv[1], split='validation', revision=sys.argv[2])"
    with hub_stand_in({NAME: STORIES}) as endpoint:
        subprocess.run(
            [sys.executable, "-c", prepare, NAME, REVISION],
            env=hub_environment(endpoint, tmp_path),
            check=True,
            capture_output=True,
        )
    assert list((tmp_path / "datasets").rglob("*.arrow"))
    result = read(endpoint, tmp_path, split="validation")
    assert result["stories"] == []
    assert_names_the_ways_out(result["error"], endpoint)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not list processes in /proc")
def test_the_reading_process_is_gone_when_the_reader_stops(tmp_path):
    children = (
        "import os, pathlib\n"
        "tasks = pathlib.Path(f'/proc/{os.getpid()}/task').glob('*/children')\n"
        "print(json.dumps(''.join(task.read_text() for task in tasks)))\n"
    )
    with hub_stand_in({NAME: STORIES}) as endpoint:
        assert finish(start(endpoint, tmp_path, script=SCRIPT.replace("read.append(story)", "break") + children)) == ""


def test_the_process_that_reads_keeps_no_lock(tmp_path):
    with hub_stand_in({NAME: STORIES}) as endpoint:
        process = start(endpoint, tmp_path / "home", script=LOCK_SCRIPT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "/stderr" in stdout
    assert "lock" not in stdout
