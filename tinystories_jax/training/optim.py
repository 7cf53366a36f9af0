"""The optimizer: clip -> AdamW, over the average of `grad_accum_steps` gradients, with warm-up and cosine."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from tinystories_jax.config import Config, OptimConfig, Schedule


class RecordNormState(NamedTuple):
    """The global norm of the gradient that the last update saw, before clipping."""

    grad_norm: jax.Array


def learning_rate_schedule(optim: OptimConfig, schedule: Schedule) -> optax.Schedule:
    """Returns count -> learning rate, where `count` updates came before: linear to the peak, cosine to the minimum.

    Update number `warmup_updates` runs at the peak and update number `total_updates`, the last, at the minimum.
    """
    curve = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=optim.learning_rate,
        warmup_steps=schedule.warmup_updates,
        decay_steps=schedule.total_updates,
        end_value=optim.min_learning_rate,
    )
    return lambda count: curve(count + 1)


def make_optimizer(config: Config) -> optax.MultiSteps:
    """Returns the optimizer of a run; its `gradient_step` counts updates, its `mini_step` the micro-steps since.

    The clip stands inside MultiSteps, so it sees the averaged gradient and not each micro-batch's.
    """
    assert config.schedule is not None
    optim = config.optim
    update = optax.chain(
        _record_norm(),
        optax.clip_by_global_norm(optim.max_grad_norm),
        optax.adamw(
            learning_rate_schedule(optim, config.schedule),
            b1=optim.beta1,
            b2=optim.beta2,
            weight_decay=optim.weight_decay,
            mask=decay_mask,
        ),
    )
    return optax.MultiSteps(update, every_k_schedule=config.train.grad_accum_steps)


def decay_mask(params: optax.Params) -> optax.Params:
    """Returns True for matrices: norm scales are not pulled towards zero."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def _record_norm() -> optax.GradientTransformation:
    def init(params: optax.Params) -> RecordNormState:
        del params
        return RecordNormState(jnp.zeros((), jnp.float32))

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None):
        del state, params
        return updates, RecordNormState(optax.tree.norm(updates))

    return optax.GradientTransformation(init, update)
