"""Checks of the machine, and of a checkpoint on it: device, driver, disk, memory, and whether a run is what it says."""

import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax

from tinystories_jax.analysis.check import Check, pass_or_fail, skip
from tinystories_jax.config import Config
from tinystories_jax.data.prepare import PreparedData
from tinystories_jax.data.tokenizer import load_tokenizer
from tinystories_jax.errors import UserError
from tinystories_jax.evaluation.validation import validate
from tinystories_jax.training import memory
from tinystories_jax.training.flops import PEAK_BF16_FLOPS
from tinystories_jax.training.jsonl import read_jsonl
from tinystories_jax.training.restore import restore_params
from tinystories_jax.training.retention import bytes_to_come
from tinystories_jax.training.run_folder import require_own_files

_OLDEST_DRIVER = 525  # the first that runs CUDA 12
_LOSS_BOUND = 1e-3  # relative: another device rounds otherwise
_MARGIN_BYTES = 2**28  # metrics, samples, TensorBoard


def check_machine(config: Config, workdir: Path, *, measure_memory: bool) -> Check:
    """Checks device, driver and free disk; with `measure_memory` compiles the training step to see what it needs."""
    device = jax.devices()[0]
    peak = PEAK_BF16_FLOPS.get(device.device_kind)
    problems, figures = _device_problems(device), {"device": device.device_kind, "peak_bf16_flops": peak}
    needed, free = bytes_to_come(config, workdir) + _MARGIN_BYTES, _free_disk(workdir)
    figures |= {"disk_needed_bytes": needed, "disk_free_bytes": free}
    problems += _place_problems(workdir)
    if free < needed:
        problems.append(
            f"the checkpoints to come and {_gb(_MARGIN_BYTES)} for logs take {_gb(needed)} but {_gb(free)} are free at "
            f"{workdir}; make room, or give another --workdir or a lower --config.checkpoint.keep"
        )
    remark = ""
    if measure_memory:
        problem, remark, of_memory = _memory(config)
        problems += problem
        figures |= of_memory
    speed = f"{peak / 1e12:.0f} TFLOP/s in bf16" if peak else "bf16 peak unknown"
    if device.platform == "gpu":
        speed += f", driver {_nvidia_driver()}"
    return pass_or_fail(
        "machine",
        not problems,
        f"{device.device_kind}, {speed}, {free / 1e9:,.0f} GB of disk free",
        f"{_gb(needed)} of disk for checkpoints to come and logs",
        on_fail="; ".join(problems),
        remark=remark,
        figures=figures,
    )


def _device_problems(device: Any) -> list[str]:
    driver = _nvidia_driver()
    if driver is None:
        return []
    if device.platform != "gpu" and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
        return [
            "there is an NVIDIA GPU, but this JAX runs on the CPU: pip install -r requirements.txt; "
            "JAX_PLATFORMS=cpu says that this is meant"
        ]
    if device.platform == "gpu" and driver < _OLDEST_DRIVER:
        return [f"the NVIDIA driver is {driver}, CUDA 12 needs {_OLDEST_DRIVER} or newer; update the driver"]
    return []


def _nvidia_driver() -> int | None:
    """Returns the major version of the NVIDIA driver, None where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return int(answer.split(".")[0])
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _nearest_folder(workdir: Path) -> Path:
    """Returns what there is of the way to `workdir`; a path below a file ends at the file."""
    place = workdir.absolute()
    while not os.path.lexists(place):
        place = place.parent
    return place


def _place_problems(workdir: Path) -> list[str]:
    place = _nearest_folder(workdir)
    try:
        require_own_files(workdir)
    except UserError as error:
        return list(error.problems)
    if place.is_dir() and os.access(place, os.W_OK):
        return []
    return [f"{place} is no folder that can be written, so {workdir} cannot be made; give another --workdir"]


def _free_disk(workdir: Path) -> int:
    place = workdir.absolute()
    while not place.is_dir():  # a link that leads nowhere, too, of which `_place_problems` tells
        place = place.parent
    return shutil.disk_usage(place).free


def _memory(config: Config) -> tuple[list[str], str, dict[str, int | None]]:
    """Returns the problem, if any, else a remark, and the figures of the memory that training needs on this device."""
    rows, limit = config.train.batch_size, memory.device_memory_bytes()
    needed = memory.try_step_bytes(config, rows)
    figures = {"memory_needed_bytes": needed, "memory_limit_bytes": limit}
    if needed is None or needed > limit:
        step = f"a step of train.batch_size={rows}"
        told = f"compiling {step} takes more memory than is free" if needed is None else f"{step} needs {_gb(needed)}"
        return [f"{told}, the device has {_gb(limit)}; {memory.advise_what_fits(config)}"], "", figures
    largest = _largest_micro_batch(config, needed, limit)
    remark = (
        f"a step needs {_gb(needed)} by XLA's own count, the device has {_gb(limit)}; micro-batches of up to about "
        f"{largest:,} rows fit"
    )
    return [], remark, figures | {"largest_micro_batch": largest}


def _largest_micro_batch(config: Config, needed: int, limit: int) -> int:
    """Returns the rows that fit, from the bytes `needed` by those of `config` and from what another number needs."""
    rows = config.train.batch_size
    other_rows = rows // 2 if rows > 1 else 2
    needed_by_others = memory.try_step_bytes(config, other_rows)
    if needed_by_others is None:
        return rows
    # What a row takes is the same for every row.
    per_row = (needed - needed_by_others) / (rows - other_rows)
    return int((limit - (needed - per_row * rows)) / max(per_row, 1))


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def check_checkpoint(data: PreparedData | None, run: Path, why_no_data: str = "") -> Check:
    """Restores the best checkpoint of `run`, recomputes its validation loss, and compares its tokenizers.

    Without `data` the loss cannot be measured, and the check is skipped when all else is well. Raises `UserError` when
    the checkpoint cannot be restored.
    """
    params, meta = restore_params(run, "best")
    logged, problems = _logged_loss(run / "metrics.jsonl", meta.update)
    own, expected = load_tokenizer(run / "tokenizer").sha256, meta.tokenizer.sha256
    if own != expected:
        problems.append(
            f"{run / 'tokenizer'} has SHA-256 {own[:16]}, the tokenizer in the checkpoint {expected[:16]}; put the "
            "run's own back, as train.py does when it goes on"
        )
    if data is not None and data.tokenizer.sha256 != expected:
        problems.append(
            f"the token caches were made with the tokenizer of SHA-256 {data.tokenizer.sha256[:16]}, the checkpoint "
            f"with {expected[:16]}; give the config that the run was trained with"
        )
    elif data is not None and data.valid.manifest.fingerprint != meta.valid_fingerprint:
        problems.append(
            "the config's validation stories are not those of the run; give the config that it was trained with"
        )
    loss, remark = None, ""
    if data is not None and not problems:
        loss = validate(params, data.valid, meta.config, meta.tokenizer.article_forms).loss
        if logged is None:
            remark = "it was saved between two evaluations, so there is no logged loss to compare with"
        elif not abs(loss - logged) <= _LOSS_BOUND * logged:
            problems.append(
                f"its validation loss is {loss:.5f}, but metrics.jsonl says {logged:.5f} for update {meta.update}: "
                "parameters, data or code have changed since; the run's environment.json names what trained it"
            )
    if data is None and not problems:
        return skip("checkpoint", f"restored, tokenizers agree; its loss cannot be measured: {why_no_data}")
    return pass_or_fail(
        "checkpoint",
        not problems,
        f"update {meta.update:,}" + ("" if loss is None else f", validation loss {loss:.5f}"),
        "" if logged is None else f"as logged, {logged:.5f} (relative {_LOSS_BOUND:g})",
        on_fail="; ".join(problems),
        remark=remark,
        figures={"update": meta.update, "loss": loss, "logged_loss": logged, "tokenizer_sha256": meta.tokenizer.sha256},
    )


def _logged_loss(path: Path, update: int) -> tuple[float | None, list[str]]:
    """Returns the loss logged for `update`, None where none was measured, and what is wrong with the log."""
    problem, loss = "", None
    try:
        rows, num_damaged = read_jsonl(path)
    except FileNotFoundError:
        problem = "is missing"
    except ValueError as error:
        problem = f"cannot be read ({error})"
    else:
        logged = [row for row in rows if row["update"] == update]
        loss = logged[-1].get("valid/loss") if logged else None
        if num_damaged:
            problem = f"has damaged lines ({num_damaged:,})"
        elif not logged:
            problem = f"has no line for update {update}"
        elif loss is not None and not (isinstance(loss, int | float) and math.isfinite(loss)):
            problem = f"has valid/loss={loss!r} for update {update}, which is no loss"
    if not problem:
        return loss, []
    advice = "so there is no logged loss to compare with; python scripts/evaluate.py measures the loss alone"
    return None, [f"{path} {problem}, {advice}"]
