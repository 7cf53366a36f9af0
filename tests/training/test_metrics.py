"""The metrics log across restarts, and the progress line."""

import json
import math
import struct
import subprocess
import sys

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

from tests.test_cli import ROOT
from tinystories_jax.training.jsonl import FileState
from tinystories_jax.training.meta import History
from tinystories_jax.training.metrics import MetricsLog, ProgressLine


def rows_of(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def events_of(path):
    """Returns the events of a file of TFRecords: a length, its checksum, so many bytes, their checksum."""
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def open_log(workdir, *, state: FileState | None = None, update: int = 0, tensorboard: bool = False) -> MetricsLog:
    return MetricsLog(workdir, history=History(), state=state, update=update, tensorboard=tensorboard)


def test_each_update_stands_once_after_a_restart(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with open_log(tmp_path, tensorboard=True) as log:
        log.write([{"update": update, "train/loss": 5.0 - update} for update in range(1, 4)])
        saved = log.state
        log.write([{"update": update, "train/loss": 5.0 - update} for update in range(4, 6)])
    path.write_text(path.read_text() + '{"update": 6, "train/lo')  # killed while writing
    with open_log(tmp_path, state=saved, update=3, tensorboard=True) as log:
        log.write([{"update": update, "train/loss": -1.0} for update in (4, 5)])
    assert [row["update"] for row in rows_of(path)] == [1, 2, 3, 4, 5]
    assert [row["train/loss"] for row in rows_of(path)] == [4.0, 3.0, 2.0, -1.0, -1.0]


def test_tensorboard_is_told_in_each_file_from_where_it_goes_on(tmp_path):
    """Its reader passes over the first such event of a run, and hides what went before at all others."""
    for update in (0, 3):
        with open_log(tmp_path, update=update, tensorboard=True) as log:
            log.write([{"update": update + 1, "train/loss": 1.0}])
    files = sorted((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    starts = [[(event.step, event.session_log.status) for event in events_of(file)][1] for file in files]
    assert starts == [(1, SessionLog.START), (4, SessionLog.START)]


def test_nan_is_written_as_null(tmp_path):
    with open_log(tmp_path) as log:
        log.write([{"update": 1, "train/loss": 1.0, "valid/article_recall": math.nan}])
    assert rows_of(tmp_path / "metrics.jsonl") == [{"update": 1, "train/loss": 1.0, "valid/article_recall": None}]


def test_progress_away_from_a_terminal_is_plain_lines(capsys):
    with ProgressLine(total=20, initial=0) as progress:
        progress.show(10, text="loss 2.000", eta_seconds=75.4)
        progress.show(20, text="loss 1.000", eta_seconds=None)
        progress.note("done")
    assert capsys.readouterr().err.splitlines() == [
        "update 10/20  loss 2.000  eta 01:15",
        "update 20/20  loss 1.000",
        "done",
    ]


def test_a_start_does_not_import_pytorch():
    program = "import sys, tinystories_jax.training.metrics; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
