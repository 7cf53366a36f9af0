"""What a run says about itself: metrics.jsonl (the source of truth), TensorBoard, the progress line, FLOPs and MFU."""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from tinystories_jax.config import ModelConfig
from tinystories_jax.model.transformer import num_params

PEAK_SOURCE = "dense bf16 with float32 accumulation, from NVIDIA's data sheets and architecture white papers"
# Peaks in FLOP/s (H100/H200: 989.4 for SXM; PCIe 756, NVL 835; Ada: 165.2 for the RTX 4090; Blackwell: 209.5 for the
# RTX 5090). By the exact name that the driver reports: "RTX 4090" is also part of "RTX 4090 Laptop GPU", another chip.
PEAK_BF16_FLOPS = {
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
}


class TokenFlops(NamedTuple):
    """The FLOPs of one training token by where they are spent."""

    layers: float
    attention: float
    logits: float


def split_flops_per_token(model: ModelConfig, sequence_length: int) -> TokenFlops:
    """Returns the FLOPs of one training token: 6 per parameter of layers and output matrix, and causal attention.

    6 N: 2 forward, 4 backward (Kaplan et al. 2020, arXiv:2001.08361). Attention: two products of half the square, so
    6 x sequence_length x width per layer. An embedding that is not also the output matrix is a look-up, not a product.
    """
    output_matrix = model.vocab_size * model.d_model
    in_layers = num_params(model) - output_matrix * (1 if model.tie_embeddings else 2)
    attention = 6.0 * sequence_length * model.num_heads * model.head_dim * model.num_layers
    return TokenFlops(layers=6.0 * in_layers, attention=attention, logits=6.0 * output_matrix)


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Returns the FLOPs of one training token, the sum of `split_flops_per_token`."""
    return sum(split_flops_per_token(model, sequence_length))


def model_flops_utilization(tokens_per_second: float, flops_per_token: float) -> float | None:
    """Returns the share of the device's dense bf16 peak, None for a device whose peak is not in the table."""
    peak = PEAK_BF16_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else tokens_per_second * flops_per_token / peak


class MetricsLog:
    """Appends rows to WORKDIR/metrics.jsonl and to TensorBoard; each update stands there exactly once.

    `evaluations` holds the rows with a validation loss, by update, in order; `seconds` what the run had taken when it
    was opened.
    """

    def __init__(self, workdir: Path, *, resume_after: int, tensorboard: bool):
        """Opens the log of a run that goes on after update `resume_after`; later rows of a lost stretch are dropped."""
        path = workdir / "metrics.jsonl"
        rows = _keep_until(path, resume_after)
        self.evaluations = {row["update"]: row for row in rows if row.get("valid/loss") is not None}
        self.seconds: float = max((row["seconds"] for row in rows if "seconds" in row), default=0.0)
        self._file = path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_after + 1 if rows else None)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes rows that each hold at least `update`; nan becomes null, since JSON has none."""
        for row in rows:
            values = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
            self._file.write(json.dumps(values, allow_nan=False) + "\n")
            if values.get("valid/loss") is not None:
                self.evaluations[values["update"]] = values
            for key, value in values.items():
                if self._board is not None and value is not None and key != "update":
                    self._board.add_scalar(key, value, row["update"])
        self._file.flush()


def append_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends JSON objects to `path`, one per line."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def drop_after(path: Path, update: int) -> None:
    """Removes the rows of `path` that stand after `update`, those of a stretch that a restart does again."""
    _keep_until(path, update)


def _keep_until(path: Path, update: int) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    # Not splitlines: a story may hold other line separators of Unicode, which JSON leaves as they are.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that a killed process was writing: its update is done again
        if isinstance(row, dict) and isinstance(row.get("update"), int) and row["update"] <= update:
            rows.append(row)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return rows


class ProgressLine:
    """A progress bar on a terminal, one plain line per look elsewhere; both on stderr."""

    def __init__(self, *, total: int, initial: int):
        self._total = total
        # The bar's own ETA counts evaluations and compiling as training; ours stands in the text.
        bar_format = "{percentage:3.0f}%|{bar:20}| update {n_fmt}/{total_fmt} [{elapsed}] {postfix}"
        self._bar = tqdm(total=total, initial=initial, disable=not sys.stderr.isatty(), bar_format=bar_format)

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def show(self, update: int, *, text: str, eta_seconds: float | None) -> None:
        """Moves to `update`; `text` holds the figures."""
        eta = "" if eta_seconds is None else f"  eta {tqdm.format_interval(eta_seconds)}"
        if self._bar.disable:
            print(f"update {update}/{self._total}  {text}{eta}", file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(text + eta, refresh=False)
            self._bar.update(update - self._bar.n)

    def note(self, line: str) -> None:
        """Prints a line without breaking the bar."""
        tqdm.write(line, file=sys.stderr)
