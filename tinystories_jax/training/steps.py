"""One micro-step of training as a pure function of state and block, and how it is compiled.

It knows nothing of files or time.
"""

import functools
import platform
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tinystories_jax.config import Config
from tinystories_jax.model.loss import next_token_loss, split_block
from tinystories_jax.model.transformer import Params, hidden_and_output, init_params
from tinystories_jax.training import optim

# One matmul in each call of oneDNN: what XLA makes of several operations fails when it runs (JAX 0.10.2). YNNPACK,
# which would take matmuls first, keeps sums and maxima, for which XLA's own loops take several times as long.
_X86_OPTIONS = {
    "xla_cpu_use_onednn": True,
    "xla_cpu_experimental_onednn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    "xla_cpu_prefer_vector_width": 512,
}
_NOT_KEPT = r"(?s)Error writing persistent compilation cache entry.*onednn-fusion"


class TrainState(NamedTuple):
    """All that training carries from one micro-step to the next."""

    micro_step: jax.Array
    params: Params
    opt_state: optax.MultiStepsState


class StepMetrics(NamedTuple):
    """Scalars of one micro-step. `loss` is plain cross-entropy in nats per token, whatever the article weight;
    `grad_norm` (before clipping) and `learning_rate` are those of the update, so they count when it is complete."""

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array


TrainStep = Callable[[TrainState, Any, jax.Array], tuple[TrainState, StepMetrics]]


def fresh_params(config: Config) -> Params:
    """Returns the parameters before the first micro-step, a pure function of the seed."""
    return init_params(config.model, jax.random.fold_in(jax.random.key(config.seed), 0))


def init_state(config: Config, optimizer: optax.MultiSteps) -> TrainState:
    """Returns the state before the first micro-step, a pure function of the seed."""
    params = fresh_params(config)
    return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))


def make_train_step(config: Config, optimizer: optax.MultiSteps, *, for_many_updates: bool = False) -> TrainStep:
    """Returns the jitted `train_step(state, block, article_mask_V)`; the given state's buffers are reused (donated).

    block: int32 (batch, sequence_length + 1); article_mask_V: True for the IDs of a / an / the. `for_many_updates`: on
    an x86 processor matmuls in float32 then go to oneDNN. An update takes less time (docs/tuning.md), but JAX
    cannot keep such a program for the next start, which spends the time of a few updates on compiling it again. In
    bf16 XLA's own are faster.
    """
    assert config.schedule is not None
    schedule = optim.learning_rate_schedule(config.optim, config.schedule)
    step = functools.partial(train_step, config=config, optimizer=optimizer, schedule=schedule)
    options = step_compiler_options(config.model.dtype) if for_many_updates else None
    return jax.jit(step, donate_argnums=0, compiler_options=options)


def step_compiler_options(dtype: str) -> dict[str, Any] | None:
    """Returns how XLA compiles a step that trains in `dtype` on this device for many updates; None for its defaults."""
    if dtype != "float32" or jax.default_backend() != "cpu" or platform.machine() != "x86_64":
        return None
    warnings.filterwarnings("ignore", _NOT_KEPT)
    return _X86_OPTIONS


def train_step(
    state: TrainState,
    block: jax.Array,
    article_mask_V: jax.Array,
    *,
    config: Config,
    optimizer: optax.MultiSteps,
    schedule: optax.Schedule,
) -> tuple[TrainState, StepMetrics]:
    """Returns the state after one micro-batch and its metrics; every `grad_accum_steps`-th updates the parameters."""
    dropout_key = None
    if config.model.dropout > 0:
        dropout_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), state.micro_step)
    inputs_BT, targets_BT = split_block(block)

    def objective(params: Params) -> tuple[jax.Array, jax.Array]:
        hidden_BTD, output_DV = hidden_and_output(params, inputs_BT, config.model, dropout_key=dropout_key)
        weights_BT = jnp.where(article_mask_V[targets_BT], config.train.article_loss_weight, 1.0)
        loss, losses_BT = next_token_loss(hidden_BTD, output_DV, targets_BT, weights_BT)
        return loss, losses_BT.mean()

    (_, loss), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    learning_rate = schedule(state.opt_state.gradient_step)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    metrics = StepMetrics(loss, opt_state.inner_opt_state[0].grad_norm, jnp.asarray(learning_rate, jnp.float32))
    return TrainState(state.micro_step + 1, params, opt_state), metrics
