"""What a run says about itself: metrics.jsonl (the source of truth), TensorBoard, the progress line."""

import math
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinystories_jax.streams import go_on_unread
from tinystories_jax.training.jsonl import FileState, JsonLines
from tinystories_jax.training.meta import History, LoggedLoss
from tinystories_jax.training.run_folder import append, cannot_write, open_unbuffered

# tensorboardX imports PyTorch where it is installed, and does without where it is not: for nothing that is used here,
# and for longer than JAX takes to start.
_HIDDEN = {"torch": None} if "torch" not in sys.modules else {}
sys.modules.update(_HIDDEN)  # type: ignore[arg-type]
try:
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
    from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]
    from tensorboardX.record_writer import masked_crc32c
finally:
    for _name in _HIDDEN:
        del sys.modules[_name]


class MetricsLog:
    """Appends rows to WORKDIR/metrics.jsonl and to TensorBoard; each update stands there exactly once.

    `evaluations` holds the validation losses of the run, by update and in order.
    """

    def __init__(self, workdir: Path, *, history: History, state: FileState | None, update: int, tensorboard: bool):
        """Opens the log of a run that goes on after `update`, when the file was at `state` (None: from the start)."""
        self.evaluations = {evaluation.update: evaluation for evaluation in history.evaluations}
        self._file = JsonLines(workdir / "metrics.jsonl", state, updates=range(1, update + 1), once=True)
        self._board = _Board(workdir / "tensorboard", update) if tensorboard else None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    @property
    def state(self) -> FileState:
        """What a checkpoint must know to go on with the file."""
        return self._file.state

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes rows that each hold at least `update`; nan becomes null, since JSON has none."""
        finite: list[dict[str, Any]] = [
            {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
            for row in rows
        ]
        self._file.write(finite)
        for row in finite:
            if row.get("valid/loss") is not None:
                update = row["update"]
                self.evaluations[update] = LoggedLoss(update, row["valid/loss"], row["valid/bits_per_byte"])
        if self._board is not None:
            self._board.write(finite)


class _Board:
    """TensorBoard's event file, written as it is called.

    tensorboardX's own SummaryWriter writes in a thread, which a full disk ends; then every call waits for it for good.
    """

    def __init__(self, folder: Path, update: int):
        """Opens a file that goes on after `update`; what earlier files say of later updates is hidden."""
        # TensorBoard reads a run's files in the order of their names.
        self._path = folder / f"events.out.tfevents.{time.time_ns()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        self._file = open_unbuffered(self._path, keep_bytes=0)
        start = Event(step=update + 1, session_log=SessionLog(status=SessionLog.START))
        # In the first file of a run too: TensorBoard hides nothing at the first such event that it reads.
        self._append([Event(file_version="brain.Event:2"), start])

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        events = []
        for row in rows:
            values = [(key, value) for key, value in row.items() if value is not None and key != "update"]
            summary = Summary(value=[Summary.Value(tag=key, simple_value=float(value)) for key, value in values])
            events.append(Event(step=row["update"], summary=summary))
        self._append(events)

    def close(self) -> None:
        self._file.close()

    def _append(self, events: Sequence[Any]) -> None:
        framed = b""
        for event in events:
            event.wall_time = time.time()
            data = event.SerializeToString()
            # A TFRecord: length and data, each with its checksum.
            length = struct.pack("<Q", len(data))
            framed += length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
        append(self._file, framed, self._path)


class ProgressLine:
    """A progress bar on a terminal, one plain line per look elsewhere; both on stderr. Training goes on where nobody
    reads them any longer, as when the terminal is closed."""

    def __init__(self, *, total: int, initial: int):
        self._total = total
        # The bar's own ETA counts evaluations and compiling as training; ours stands in the text.
        bar_format = "{percentage:3.0f}%|{bar:20}| update {n_fmt}/{total_fmt} [{elapsed}] {postfix}"
        self._bar = tqdm(total=total, initial=initial, disable=not sys.stderr.isatty(), bar_format=bar_format)

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *exception: object) -> None:
        with go_on_unread():
            self._bar.close()

    def show(self, update: int, *, text: str, eta_seconds: float | None) -> None:
        """Moves to `update`; `text` holds the figures."""
        eta = "" if eta_seconds is None else f"  eta {tqdm.format_interval(eta_seconds)}"
        with go_on_unread():
            if self._bar.disable:
                print(f"update {update}/{self._total}  {text}{eta}", file=sys.stderr, flush=True)
            else:
                self._bar.set_postfix_str(text + eta, refresh=False)
                self._bar.update(update - self._bar.n)

    def note(self, line: str) -> None:
        """Prints a line without breaking the bar."""
        with go_on_unread():
            tqdm.write(line, file=sys.stderr)
