"""How time grows: a training step with its FLOPs, along batch, context, depth and width; a token with its position."""

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any

from tinystories_jax.analysis.benchmark.decode import time_positions
from tinystories_jax.analysis.benchmark.inputs import with_rows, with_synthetic_data
from tinystories_jax.analysis.benchmark.train import start_training
from tinystories_jax.analysis.timing import spread_of
from tinystories_jax.config import Config
from tinystories_jax.training.flops import flops_per_token

_SAMPLE_SECONDS, _MIN_ROUNDS = 0.5, 5


def measure_growth(config: Config, rows: int, rounds: int) -> dict[str, Any]:
    """Returns the time of an update against its FLOPs along four axes, and that of a token against its position.

    Around the config's own shapes, at `rows` rows and one micro-step an update. The sizes of an axis take turns,
    `rounds` times and at least five, so that a slower minute of the machine slows all of them.
    """
    config = dataclasses.replace(config, train=dataclasses.replace(with_rows(config, rows).train, grad_accum_steps=1))
    return {
        "rows": rows,
        "axes": {axis: _measure_axis(config, grow, factors, rounds) for axis, (grow, factors) in _AXES.items()},
        "positions": time_positions(with_synthetic_data(config)),
    }


def _measure_axis(
    config: Config, grow: Callable[[Config, float], Config], factors: tuple[float, ...], rounds: int
) -> list[dict[str, Any]]:
    """Returns shape, FLOPs and seconds of each point, and how far it is from linear growth.

    `deviation` is the median, over rounds, of seconds per FLOP against those of the second point, minus 1: the smallest
    size is allowed to be slow.
    """
    # Half of one layer is one layer: each shape once.
    points = list(dict.fromkeys(with_synthetic_data(grow(config, factor)) for factor in factors))
    runs = [start_training(point) for point in points]
    per_sample = [math.ceil(_SAMPLE_SECONDS / run.run_updates(1)) for run in runs]
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(max(rounds, _MIN_ROUNDS)):
        for run, count, taken in zip(runs, per_sample, samples, strict=True):
            taken.append(run.run_updates(count) / count)
    flops = [
        flops_per_token(point.model, point.data.sequence_length) * point.train.batch_size * point.data.sequence_length
        for point in points
    ]
    per_flop = [[seconds / work for seconds in taken] for taken, work in zip(samples, flops, strict=True)]
    unit = per_flop[min(1, len(points) - 1)]
    return [
        {
            "shape": _describe(point),
            "flops": work,
            "seconds": spread_of(taken)._asdict(),
            "deviation": statistics.median(one / other for one, other in zip(own, unit, strict=True)) - 1,
        }
        for point, work, taken, own in zip(points, flops, samples, per_flop, strict=True)
    ]


def _describe(config: Config) -> str:
    model = config.model
    return (
        f"{config.train.batch_size} x {config.data.sequence_length}, {model.num_layers} layers, "
        f"width {model.d_model}, {model.d_ff}"
    )


def _scale(count: int, factor: float) -> int:
    return max(round(count * factor), 1)


def _grow_batch(config: Config, factor: float) -> Config:
    return with_rows(config, _scale(config.train.batch_size, factor))


def _grow_context(config: Config, factor: float) -> Config:
    length = _scale(config.data.sequence_length, factor)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=length))


def _grow_depth(config: Config, factor: float) -> Config:
    layers = _scale(config.model.num_layers, factor)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=layers))


def _grow_width(config: Config, factor: float) -> Config:
    """Returns more or fewer heads of the same width, and a feed-forward width in proportion."""
    model = config.model
    shared = model.num_heads // model.num_kv_heads
    kv_heads = _scale(model.num_kv_heads, factor)
    d_model = kv_heads * shared * model.head_dim
    grown = dataclasses.replace(
        model,
        num_heads=kv_heads * shared,
        num_kv_heads=kv_heads,
        d_model=d_model,
        d_ff=_scale(model.d_ff, d_model / model.d_model),
    )
    return dataclasses.replace(config, model=grown)


# Of the config's own size; FLOPs grow with the square of the width.
_AXES = {
    "batch": (_grow_batch, (0.5, 1.0, 2.0, 4.0)),
    "context": (_grow_context, (0.5, 1.0, 2.0, 4.0)),
    "depth": (_grow_depth, (0.5, 1.0, 2.0, 4.0)),
    "width": (_grow_width, (0.5, 1.0, 1.5, 2.0)),
}
