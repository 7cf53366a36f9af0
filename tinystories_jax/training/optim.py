"""The optimizer: clip -> AdamW (or Muon for matrices and AdamW for the rest), over the average of `grad_accum_steps`
gradients, with warm-up and cosine."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tinystories_jax.config import Config, OptimConfig, Schedule

# Root mean square of Muon's updates at a rate of 1, whatever the shape of the matrix: what AdamW's come to, so that one
# weight decay suits both (Liu et al. 2025, arXiv:2502.16982).
MUON_UPDATE_RMS = 0.2

# Of a stack of matrices.
_ROWS_AND_COLUMNS = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)


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
    schedule = learning_rate_schedule(optim, config.schedule)
    inner: Any = optax.adamw(schedule, b1=optim.beta1, b2=optim.beta2, weight_decay=optim.weight_decay, mask=decay_mask)
    if optim.muon_learning_rate:
        muon = optax.contrib.muon(
            lambda count: schedule(count) * (optim.muon_learning_rate / optim.learning_rate),
            beta=optim.muon_momentum,
            weight_decay=optim.weight_decay,
            consistent_rms=MUON_UPDATE_RMS,
            muon_weight_dimension_numbers=functools.partial(jax.tree.map, lambda stack: _ROWS_AND_COLUMNS),
        )
        inner = optax.partition({"muon": _in_stacks(muon), "adamw": inner}, optimizer_of)
    update = optax.chain(_record_norm(), optax.clip_by_global_norm(optim.max_grad_norm), inner)
    num_steps = config.train.grad_accum_steps
    return optax.MultiSteps(update, num_steps) if num_steps > 1 else _SingleSteps(update, num_steps)


def optimizer_of(params: optax.Params) -> optax.Params:
    """Returns "muon" for the matrices of the layers and "adamw" for all else, where a config uses Muon.

    Muon turns a gradient into the nearest matrix that stretches all directions alike (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon). The rows of embedding and output matrix are one per token: most are not in a
    batch, and should not move as far as the others.
    """

    def choose(path: tuple[Any, ...], leaf: jax.Array) -> str:
        return "muon" if path[0] == jax.tree_util.DictKey("layers") and leaf.ndim == 2 else "adamw"

    return jax.tree_util.tree_map_with_path(choose, params)


def decay_mask(params: optax.Params) -> optax.Params:
    """Returns True for matrices: norm scales are not pulled towards zero."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


class _SingleSteps(optax.MultiSteps):
    """Where every micro-step is an update: nothing is added up, so there is no place for sums, and nothing is chosen
    between the state before and after, for which all of both would be read and written again (docs/tuning.md)."""

    def init(self, params: optax.Params) -> optax.MultiStepsState:
        return super().init(params)._replace(acc_grads=())

    def update(
        self,
        updates: optax.Updates,
        state: optax.MultiStepsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.MultiStepsState]:
        updates, inner_state = self.inner_opt.update(updates, state.inner_opt_state, params, **extra_args)
        return updates, state._replace(gradient_step=state.gradient_step + 1, inner_opt_state=inner_state)


def _in_stacks(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns `inner` for trees of matrices, which it gets, and keeps the state of, as one stack per shape.

    Muon multiplies each matrix fifteen times an update: a few large matmuls take less time than many small ones.
    """

    def name(leaf: jax.Array) -> str:
        return "x".join(map(str, leaf.shape))

    def stack(tree: optax.Params) -> dict[str, jax.Array]:
        matrices: dict[str, list[jax.Array]] = {}
        for leaf in jax.tree.leaves(tree):
            matrices.setdefault(name(leaf), []).append(leaf)
        return {shape: jnp.stack(same) for shape, same in matrices.items()}

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(stack(params))

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None):
        assert params is not None
        stacks: Any
        stacks, state = inner.update(stack(updates), state, stack(params))
        matrices = {shape: iter(stacked) for shape, stacked in stacks.items()}
        return jax.tree.map(lambda leaf: next(matrices[name(leaf)]), updates), state

    return optax.GradientTransformation(init, update)


def _record_norm() -> optax.GradientTransformation:
    def init(params: optax.Params) -> RecordNormState:
        del params
        return RecordNormState(jnp.zeros((), jnp.float32))

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None):
        del state, params
        return updates, RecordNormState(optax.tree.norm(updates))

    return optax.GradientTransformation(init, update)
