"""Our parameters under the names of Hugging Face's LlamaForCausalLM, and the loss they give: what a peer must equal."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinystories_jax.analysis.benchmark.inputs import synthetic_tokens
from tinystories_jax.config import Config
from tinystories_jax.data.cache import micro_batch_at
from tinystories_jax.model.loss import next_token_loss, split_block
from tinystories_jax.model.transformer import Params, hidden_and_output, init_params, num_params

_NUM_ROWS = 2


def write_reference(config: Config, path: Path) -> dict[str, Any]:
    """Writes fresh parameters (under Hugging Face's names) and a block of two rows into `path`, an .npz file; returns
    the count of parameters and the float32 loss, in nats per token, of those parameters on that block."""
    model = dataclasses.replace(config.model, dtype="float32")
    params = init_params(model, jax.random.key(0))
    block = micro_batch_at(synthetic_tokens(config), config, 0, num_rows=_NUM_ROWS)

    @jax.jit
    def measure_loss(params: Params, block: jax.Array) -> jax.Array:
        inputs_BT, targets_BT = split_block(block)
        hidden_BTD, output_DV = hidden_and_output(params, inputs_BT, model)
        return next_token_loss(hidden_BTD, output_DV, targets_BT, jnp.ones(targets_BT.shape))[0]

    arrays: dict[str, Any] = {"block": block, **to_llama_weights(params)}
    np.savez(path, **arrays)
    with jax.default_matmul_precision("highest"):  # a GPU has another idea of float32: TF32
        loss = float(measure_loss(params, jnp.asarray(block)))
    return {"num_params": num_params(model), "loss": loss}


def to_llama_weights(params: Params) -> dict[str, np.ndarray]:
    """Returns the parameters by Hugging Face's names: a matrix (out, in), the transpose of ours (in, out)."""
    weights: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *modules, kind = (str(part.key) for part in path)
        prefix = "" if modules[0] == "lm_head" else "model."
        value = np.asarray(leaf)
        weights[f"{prefix}{'.'.join(modules)}.weight"] = value.T if kind == "kernel" else value
    return weights
