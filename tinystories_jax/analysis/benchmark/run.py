"""The benchmark as a whole: which measurements a mode asks for, on which machine, and everything in one JSON object.

This process measures nothing itself and starts no device: each measurement gets a process of its own.
"""

import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import jax

from tinystories_jax.analysis.benchmark.child import Environment, call_as_script, run_in_child
from tinystories_jax.analysis.benchmark.data import measure_data
from tinystories_jax.analysis.benchmark.decode import measure_decode
from tinystories_jax.analysis.benchmark.growth import measure_growth
from tinystories_jax.analysis.benchmark.inputs import require_room_to_write, with_synthetic_data
from tinystories_jax.analysis.benchmark.peer_rounds import compare_decoding, compare_training, require_peer
from tinystories_jax.analysis.benchmark.start import measure_start
from tinystories_jax.analysis.benchmark.train import cheap_rows, measure_train
from tinystories_jax.config import Config, to_dict
from tinystories_jax.errors import UserError
from tinystories_jax.processor import describe_processor
from tinystories_jax.versions import find_settings, find_versions

MODES = ("train", "decode", "data", "start", "growth")
_WITH_PEER = ("train", "decode")
# Of a micro-step on a CPU: 8 rows of the recipe; and where many shapes or whole processes are timed, a row or two.
_CPU_STEP_FLOPS, _CPU_QUICK_STEP_FLOPS = 1e12, 2e11
_TRAIN_SECONDS, _DECODE_SECONDS, _ROUND_SECONDS = 20.0, 10.0, 10.0
_DECODE_ROWS, _DECODE_ROWS_ON_CPU = (1, 32, 64, 256), (1, 32)
# What is compiled is compiled here and now, not found among the programs of an earlier run.
_COMPILING: Environment = {"JAX_COMPILATION_CACHE_DIR": None}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "tokenizers", "numpy", "torch", "transformers")
_SETTINGS = ("JAX_", "XLA_", "MALLOC_", "OMP_", "MKL_", "TOKENIZERS_", "RAYON_", "CUDA_", "TORCH", "LD_PRELOAD")


def run_benchmark(
    config: Config, mode: str, *, rounds: int, peer: bool, log: Callable[[str], None], trace: str = ""
) -> Iterator[dict[str, Any]]:
    """Yields the figures, first the machine's alone, then with one section more each time; all of it can be JSON.

    `mode` is one of MODES or "all"; `config` needs no data; `trace` is a folder for a profile of training, or empty.
    Raises `UserError` before anything is measured for a mode that there is not, for a context too short to write into,
    and for a peer that is not installed.
    """
    modes = _choose_modes(mode, peer)
    if trace and "train" not in modes:
        raise UserError(f"--trace={trace}: {mode!r} does not train; it goes with train and all")
    if peer:
        require_peer(config)
    if not {"decode", "growth"}.isdisjoint(modes):
        require_room_to_write(config)
    shapes = with_synthetic_data(config)
    log("looking at the device")
    device = run_in_child(describe_device, shapes)
    figures: dict[str, Any] = {"machine": {**_describe_machine(), **device}, "config": to_dict(shapes)}
    yield figures
    for name in modes:
        log(f"measuring {name}")
        figures[name] = _measure(name, config, device, rounds, trace, log)
        yield figures
        if peer and name in _WITH_PEER:
            figures[f"{name}_peer"] = _compare(name, shapes, device, rounds, log)
            yield figures


def _choose_modes(mode: str, peer: bool) -> tuple[str, ...]:
    if mode != "all" and mode not in MODES:
        raise UserError(f"{mode!r} is no mode; give one of {', '.join(MODES)}, or all")
    if peer and mode not in (*_WITH_PEER, "all"):
        raise UserError(f"--peer has nothing to compare in {mode!r}; it goes with {', '.join(_WITH_PEER)} and all")
    return MODES if mode == "all" else (mode,)


def _measure(
    name: str, config: Config, device: dict[str, Any], rounds: int, trace: str, log: Callable[[str], None]
) -> Any:
    shapes, rows, quick_rows = with_synthetic_data(config), device["rows"], device["quick_rows"]

    def measure(*call: Any) -> Any:
        return run_in_child(call_as_script, *call, environment=_COMPILING)

    if name == "train":
        return measure(measure_train, shapes, rows, _TRAIN_SECONDS, trace)
    if name == "decode":
        batch_sizes = _DECODE_ROWS_ON_CPU if device["platform"] == "cpu" else _DECODE_ROWS
        return measure(measure_decode, shapes, batch_sizes, _DECODE_SECONDS)
    if name == "data":
        return measure_data(config, rounds, log)
    if name == "start":
        return measure_start(config, quick_rows, rounds, log)
    return measure(measure_growth, config, quick_rows, rounds)


def _compare(name: str, shapes: Config, device: dict[str, Any], rounds: int, log: Callable[[str], None]) -> Any:
    if name == "train":
        return compare_training(shapes, device["rows"], device["platform"], rounds, _ROUND_SECONDS, log)
    return compare_decoding(shapes, device["platform"], rounds, _ROUND_SECONDS, log)


def describe_device(config: Config) -> dict[str, Any]:
    """Returns the device and the rows of a micro-batch that can be timed on it in little time."""
    devices = jax.devices()
    return {
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "platform": devices[0].platform,
        "rows": cheap_rows(config, _CPU_STEP_FLOPS),
        "quick_rows": cheap_rows(config, _CPU_QUICK_STEP_FLOPS),
    }


def _describe_machine() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "settings": find_settings(_SETTINGS),
        "system": platform.platform(),
        "cpu": describe_processor().get("model name", platform.processor()),
        "cpu_cores": usable,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_before": os.getloadavg()[0],
        "versions": find_versions(_PACKAGES),
    }
