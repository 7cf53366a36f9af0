"""The metrics log across restarts, FLOPs by hand, MFU only where the peak is known."""

import dataclasses
import json
import math
import struct
import subprocess
import sys

import jax
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

from tests.test_cli import ROOT
from tests.tiny import make_tiny_config
from tinystories_jax.config import ModelConfig
from tinystories_jax.training.jsonl import FileState
from tinystories_jax.training.meta import History
from tinystories_jax.training.metrics import (
    PEAK_BF16_FLOPS,
    MetricsLog,
    ProgressLine,
    flops_per_token,
    model_flops_utilization,
    split_flops_per_token,
)

TOP10K = ModelConfig(
    d_model=448,
    num_layers=7,
    num_heads=7,
    num_kv_heads=7,
    d_ff=1344,
    rope_theta=10_000.0,
    tie_embeddings=True,
    dropout=0.0,
    dtype="bfloat16",
    remat=False,
    head_dim=64,
    vocab_size=10_000,
)


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


def test_flops_per_token_by_hand():
    assert flops_per_token(TOP10K, 512) == 6 * 22_750_784 + 6 * 512 * 448 * 7
    untied = dataclasses.replace(TOP10K, tie_embeddings=False)
    assert flops_per_token(untied, 512) == flops_per_token(TOP10K, 512)


def test_flops_split_by_hand():
    norms = (2 * 7 + 1) * 448
    layers = 7 * (4 * 448 * 448 + 3 * 448 * 1344) + norms
    split = split_flops_per_token(TOP10K, 512)
    assert split == (6 * layers, 6 * 512 * 448 * 7, 6 * 10_000 * 448)
    assert sum(split) == flops_per_token(TOP10K, 512)
    assert split_flops_per_token(dataclasses.replace(TOP10K, tie_embeddings=False), 512) == split


def test_mfu_of_an_unknown_device_is_none(monkeypatch):
    monkeypatch.delitem(PEAK_BF16_FLOPS, jax.devices()[0].device_kind, raising=False)
    assert model_flops_utilization(1e6, flops_per_token(make_tiny_config().model, 16)) is None


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
