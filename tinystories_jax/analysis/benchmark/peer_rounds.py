"""Ours and PyTorch in turns, each time in a fresh process: what both do on the same shapes, and the ratios."""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinystories_jax.analysis.benchmark.child import Environment, call_as_script, run_in_child
from tinystories_jax.analysis.benchmark.decode import time_decoding
from tinystories_jax.analysis.benchmark.reference import write_reference
from tinystories_jax.analysis.benchmark.train import time_training
from tinystories_jax.analysis.timing import spread_of
from tinystories_jax.config import Config
from tinystories_jax.errors import UserError

# glibc's allocator gives memory back after every step and takes it anew, page by page, unless told otherwise.
TUNED_MALLOC: Environment = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "268435456",
}
_DEFAULT_MALLOC: Environment = dict.fromkeys(TUNED_MALLOC)
_LOSS_BOUND = 1e-4  # relative; float32 sums in another order
_DECODE_ROWS = (1, 32)

_Run = Callable[[], dict[str, Any]]


def require_peer(config: Config) -> None:
    """Raises `UserError` unless PyTorch and transformers are installed and can express `config`."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--peer needs {' and '.join(missing)}, not installed here; "
            "python -m pip install torch transformers, or the extra: python -m pip install -e '.[peer]'"
        )
    if config.model.dropout > 0:
        raise UserError(
            f"--peer: model.dropout={config.model.dropout} has no counterpart in LlamaForCausalLM; "
            "give --config.model.dropout=0.0"
        )
    if config.optim.muon_learning_rate > 0:
        raise UserError(
            f"--peer: optim.muon_learning_rate={config.optim.muon_learning_rate} has no counterpart in PyTorch's "
            "AdamW; give --config.optim.muon_learning_rate=0.0"
        )


def compare_training(
    config: Config, rows: int, platform: str, rounds: int, seconds: float, log: Callable[[str], None]
) -> dict[str, Any]:
    """Returns tokens per second of ours and of PyTorch, eager and compiled, `rounds` times in turns, and the ratios."""
    from tinystories_jax.analysis import peer

    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        weights = Path(folder) / "weights.npz"
        same = check_same_function(config, weights, platform)
        caches = _compile_caches(folder, platform)
        sides = {"ours": _later({**_DEFAULT_MALLOC, **caches}, call_as_script, time_training, config, rows, seconds)}
        for allocator, environment in _allocators(platform).items():
            for name, compiled in (("eager", False), ("compiled", True)):
                sides[f"PyTorch {name}{allocator}"] = _later(
                    {**environment, **caches}, peer.time_training, config, rows, seconds, compiled, weights, platform
                )
        taken = _alternate(sides, rounds, log)
    speeds = {side: _speed(runs) for side, runs in taken.items()}
    return {"rows": rows, **same, "sides": speeds, "ratios": _ratios(speeds)}


def compare_decoding(
    config: Config, platform: str, rounds: int, seconds: float, log: Callable[[str], None]
) -> dict[str, Any]:
    """Returns tokens per second of ours and of PyTorch's `generate`, by batch size, and the ratios."""
    from tinystories_jax.analysis import peer

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        weights = Path(folder) / "weights.npz"
        figures |= check_same_function(config, weights, platform)
        caches = _compile_caches(folder, platform)
        for rows in _DECODE_ROWS:
            sides = {
                "ours": _later({**_DEFAULT_MALLOC, **caches}, call_as_script, _time_our_decoding, config, rows, seconds)
            }
            for allocator, environment in _allocators(platform).items():
                sides[f"PyTorch eager{allocator}"] = _later(
                    {**environment, **caches}, peer.time_decoding, config, rows, seconds, weights, platform
                )
            taken = _alternate(sides, rounds, log)
            speeds = {side: _speed(runs) for side, runs in taken.items()}
            figures[f"batch {rows}"] = {"sides": speeds, "ratios": _ratios(speeds)}
    return figures


def check_same_function(config: Config, weights: Path, platform: str) -> dict[str, Any]:
    """Writes our fresh parameters to `weights`; returns the count of parameters and both losses, which must agree."""
    from tinystories_jax.analysis import peer

    ours = run_in_child(write_reference, config, weights)
    theirs = run_in_child(peer.compute_reference, config, weights, platform)
    if ours["num_params"] != theirs["num_params"]:
        raise RuntimeError(f"the peer has {theirs['num_params']:,} parameters, ours {ours['num_params']:,}")
    if not abs(ours["loss"] - theirs["loss"]) <= _LOSS_BOUND * ours["loss"]:
        raise RuntimeError(f"the same parameters and tokens give the peer {theirs['loss']} nats, ours {ours['loss']}")
    return {"num_params": ours["num_params"], "first_loss": {"ours": ours["loss"], "PyTorch": theirs["loss"]}}


def _time_our_decoding(config: Config, rows: int, seconds: float) -> dict[str, Any]:
    figures = time_decoding(config, rows, seconds)
    return {"dtype": figures["matrix_form"], "tokens_per_second": figures["tokens_per_second"]["median"]}


def _allocators(platform: str) -> dict[str, Environment]:
    """Returns, by what is added to the name of a side of PyTorch, the variables to run it with.

    Ours, as all scripts, sees to its memory itself (`keep_freed_memory`). On a GPU they make no difference.
    """
    if platform != "cpu":
        return {"": {}}
    return {", default malloc": _DEFAULT_MALLOC, ", tuned malloc": TUNED_MALLOC}


def _compile_caches(folder: str, platform: str) -> Environment:
    """Returns the variables by which the first round's compiled programs serve the others, and no later benchmark."""
    caches = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/jax", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/torch"}
    if platform != "cpu":
        return caches
    # One thread: workers that outlive the compiling would stand beside what is timed. They leave a GPU alone, whose
    # kernels one thread had not compiled after 170 seconds.
    return {**caches, "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def _later(environment: Environment, function: Callable[..., dict[str, Any]], *arguments: Any) -> _Run:
    return lambda: run_in_child(function, *arguments, environment=environment)


def _alternate(sides: dict[str, _Run], rounds: int, log: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    taken: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for turn in range(1, rounds + 1):
        for side, run in sides.items():
            taken[side].append(run())
            log(f"round {turn} of {rounds}: {side}, {taken[side][-1]['tokens_per_second']:,.0f} tokens/s")
    return taken


def _speed(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the spread, over rounds, of the medians of tokens per second, and the most of what else the runs told."""
    others = {
        name: max((run[name] for run in runs if run[name] is not None), default=None)
        for name in ("compile_seconds", "planned_bytes", "device_bytes", "process_bytes")
        if name in runs[0]
    }
    speeds = spread_of([run["tokens_per_second"] for run in runs])
    return {"tokens_per_second": speeds._asdict(), "dtype": runs[0]["dtype"], **others}


def _ratios(speeds: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Returns ours / theirs for every two sides, medians of tokens per second; above 1 ours is faster."""
    medians = {side: figures["tokens_per_second"]["median"] for side, figures in speeds.items()}
    ours = [side for side in medians if side.startswith("ours")]
    return {f"{one} / {other}": medians[one] / medians[other] for one in ours for other in medians if other not in ours}
