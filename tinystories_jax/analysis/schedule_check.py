"""The check of the schedule by measurement: the learning rates that a run's own optimizer applies."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinystories_jax.analysis.check import Check, pass_or_fail
from tinystories_jax.config import Config, OptimConfig, Schedule
from tinystories_jax.training import optim

_NO_CLIP = 1e9
_SCHEDULE_BOUND = 1e-3  # of the peak


def check_schedule(config: Config) -> Check:
    """Measures the learning rate that the run's own optimizer applies at its first update, the peak, half-way down,
    the last but one and the last, by how far it moves a parameter under a unit gradient."""
    schedule = config.schedule
    assert schedule is not None
    total, warmup = schedule.total_updates, schedule.warmup_updates
    asked_total, asked_warmup = _asked(config, schedule.num_blocks)
    numbers = sorted({max(number, 1) for number in (1, warmup, (warmup + total) // 2, total - 1, total)})
    # Without the clip, whose scale the optimizers would forget but for their epsilon.
    unclipped = dataclasses.replace(config, optim=dataclasses.replace(config.optim, max_grad_norm=_NO_CLIP))
    optimizer = optim.make_optimizer(unclipped)
    apply = jax.jit(functools.partial(_applied_rates, optimizer, config))
    with jax.default_matmul_precision("highest"):
        moved = {number: jax.device_get(apply(number)) for number in numbers}
    curve = jax.jit(optim.learning_rate_schedule(config.optim, schedule))
    rates = {
        "applied": {number: float(moved[number][0]) for number in numbers},
        "in_layers": {number: float(moved[number][1]) for number in numbers},
        "logged": {number: float(curve(jnp.int32(number - 1))) for number in numbers},
    }
    expected = {number: _expected_rate(config.optim, schedule, number) for number in numbers}
    peak = config.optim.learning_rate
    worst = max(numbers, key=lambda n: max(abs(rate[n] - expected[n]) for rate in rates.values()))
    error = float(np.max([abs(rate[n] - expected[n]) for rate in rates.values() for n in numbers])) / (peak or 1.0)
    right_length = (total, warmup) == (asked_total, asked_warmup)
    meaning = (
        f"update {worst:,} of {total:,} runs at {_show_rates(rates, worst)}, by definition {expected[worst]:.3e}"
        if right_length
        else f"the run has {total:,} updates with a warm-up of {warmup:,}, but config and data ask for {asked_total:,} "
        f"with {asked_warmup:,}"
    )
    applied = rates["applied"]
    at_peak = max(warmup, 1)
    return pass_or_fail(
        "schedule",
        error <= _SCHEDULE_BOUND and right_length and peak > 0,
        f"{applied[at_peak]:.2e} at {at_peak:,}, {applied[total]:.2e} at {total:,}",
        f"{expected[at_peak]:.2e} at {at_peak:,}, {expected[total]:.2e} at {total:,}, the last",
        on_fail=f"{meaning}: the schedule does not fit the run. See learning_rate_schedule and make_optimizer."
        if peak > 0
        else "optim.learning_rate=0: nothing would be learnt; give a rate above 0",
        remark=f"optim.warmup_updates={config.optim.warmup_updates:,} is cut to half of the run"
        * (warmup < config.optim.warmup_updates),
        figures={**rates, "expected": expected, "total_updates": total},
        details=[
            f"update {number:,}: {_show_rates(rates, number)}, by definition {expected[number]:.3e}"
            for number in numbers
        ],
    )


def _asked(config: Config, num_blocks: int) -> tuple[int, int]:
    """Returns the updates and the warm-up that the config's own values ask for."""
    train = config.train
    rows_per_update = train.batch_size * train.grad_accum_steps
    total = train.max_updates or -(-train.num_epochs * num_blocks // rows_per_update)
    return total, min(config.optim.warmup_updates, total // 2)


def _expected_rate(optim_config: OptimConfig, schedule: Schedule, number: int) -> float:
    """Returns the definition: linear from 0 to the peak at update `warmup_updates`, then half a cosine to the last."""
    peak, lowest = optim_config.learning_rate, optim_config.min_learning_rate
    warmup, total = schedule.warmup_updates, schedule.total_updates
    if number <= warmup:
        return peak * number / warmup
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * (number - warmup) / (total - warmup))) / 2


def _show_rates(rates: dict[str, dict[int, float]], number: int) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {rate[number]:.3e}" for name, rate in rates.items())


def _applied_rates(optimizer: Any, config: Config, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the rates at which update `number` moves an embedding and a matrix of a layer.

    AdamW's first step is rate x sign of the gradient. Muon's rate is given as AdamW's that belongs to it: divided by
    the ratio of their peaks.
    """
    matrix = jnp.zeros((2, 2))  # zeros: nothing to decay
    params = {"embed_tokens": {"embedding": matrix}, "layers": {0: {"kernel": matrix}}}
    state = optimizer.init(params)
    # What counts updates is set to those before; Adam's own count, which mends the bias of its averages, stays 0.
    before = jnp.asarray(number - 1, jnp.int32)
    inner = jax.tree.map(
        lambda part: part._replace(count=before) if _counts_updates(part) else part,
        state.inner_opt_state,
        is_leaf=_counts_updates,
    )
    state = state._replace(gradient_step=before, inner_opt_state=inner)

    def micro_step(_: int, carried: Any) -> Any:
        return optimizer.update(jax.tree.map(jnp.ones_like, params), carried[1], params)

    updates, _ = jax.lax.fori_loop(0, config.train.grad_accum_steps, micro_step, (params, state))
    embedding, kernel = -updates["embed_tokens"]["embedding"][0, 0], -updates["layers"][0]["kernel"][0, 0]
    if config.optim.muon_learning_rate:
        kernel /= _first_muon_step() * config.optim.muon_learning_rate / config.optim.learning_rate
    return embedding, kernel


def _first_muon_step() -> float:
    """Returns how far Muon at a rate of 1 moves each value of a 2 x 2 matrix whose gradient is all ones.

    Such a gradient stretches one direction; five Newton-Schulz steps take that singular value from 1 to about 1.
    """
    singular_value = 1.0
    for _ in range(5):
        singular_value = 3.4445 * singular_value - 4.7750 * singular_value**3 + 2.0315 * singular_value**5
    return optim.MUON_UPDATE_RMS * math.sqrt(2) * singular_value / 2


def _counts_updates(part: Any) -> bool:
    return hasattr(part, "_fields") and part._fields == ("count",)
