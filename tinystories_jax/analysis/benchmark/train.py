"""The very `train_step` of training, timed in the config's own shapes."""

from typing import Any

import jax
import jax.numpy as jnp

from tinystories_jax.analysis.benchmark.child import peak_resident_bytes
from tinystories_jax.analysis.benchmark.inputs import synthetic_tokens, with_rows
from tinystories_jax.analysis.benchmark.roofline import count_flash_attention_calls, measure_rates, roofline
from tinystories_jax.analysis.timing import time_repeated
from tinystories_jax.analysis.training_run import TrainingRun
from tinystories_jax.config import Config
from tinystories_jax.errors import UserError, is_out_of_memory
from tinystories_jax.model.attention import uses_flash_attention
from tinystories_jax.model.loss import next_token_loss, num_chunks
from tinystories_jax.model.transformer import num_params
from tinystories_jax.training.flops import flops_per_token, model_flops_utilization, split_flops_per_token
from tinystories_jax.training.memory import StepMemory


def cheap_rows(config: Config, max_flops: float) -> int:
    """Returns train.batch_size, halved on a CPU until a micro-step has at most `max_flops`, and at least one row."""
    rows = config.train.batch_size
    flops_per_row = flops_per_token(config.model, config.data.sequence_length) * config.data.sequence_length
    while jax.default_backend() == "cpu" and rows > 1 and rows * flops_per_row > max_flops:
        rows //= 2
    return rows


def start_training(config: Config) -> TrainingRun:
    """Returns a run of `config` on synthetic tokens, compiled and warmed up."""
    run = TrainingRun(config, synthetic_tokens(config))
    run.compile(config.train.batch_size)
    run.warm_up(config.train.grad_accum_steps)
    return run


def measure_train(config: Config, rows: int, seconds: float, trace: str = "") -> dict[str, Any]:
    """Returns the figures of training in micro-batches of `rows` rows, updates sampled for about `seconds`.

    One more update is profiled by JAX, if `trace` names a folder for that.
    """
    config = with_rows(config, rows)
    try:
        run = start_training(config)
        update_seconds = time_repeated(run.run_updates, seconds=seconds)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory with train.batch_size={rows}; try --config.train.batch_size={max(1, rows // 2)}"
        ) from error
    # Before the rates are measured, which take memory of their own.
    peak_memory = _peak_memory(run.memory)
    rates = measure_rates()
    data_wait_fraction = run.data_wait_fraction()
    if trace:
        with jax.profiler.trace(trace):
            run.run_updates(1)
    length, device = config.data.sequence_length, jax.devices()[0]
    token_flops = flops_per_token(config.model, length)
    micro_step_seconds = update_seconds.scaled(1 / config.train.grad_accum_steps)
    tokens_per_second = micro_step_seconds.rate(rows * length)
    flash_attention = find_flash_attention(config, device, run.compiled.as_text())
    return {
        "rows": rows,
        "sequence_length": length,
        "micro_steps_per_update": config.train.grad_accum_steps,
        "dtype": config.model.dtype,
        "num_params": num_params(config.model),
        "compile_seconds": run.compile_seconds,
        "micro_step_seconds": micro_step_seconds._asdict(),
        "update_seconds": update_seconds._asdict(),
        "tokens_per_second": tokens_per_second._asdict(),
        "flops_per_token": token_flops,
        "flops_formula": describe_flops(config),
        "mfu": model_flops_utilization(tokens_per_second.median, token_flops),
        "data_wait_fraction": data_wait_fraction,
        "peak_memory": peak_memory,
        "flash_attention": flash_attention,
        "copy_bytes_per_second": rates.copy_bytes_per_second._asdict(),
        "matmul_flops_per_second": {name: rate._asdict() for name, rate in rates.matmul_flops_per_second.items()},
        "roofline": roofline(
            count_cost(run.compiled, config),
            formula_flops=token_flops * rows * length,
            seconds=micro_step_seconds.median,
            rates=rates,
            dtype=config.model.dtype,
        )._asdict(),
    }


def time_training(config: Config, rows: int, seconds: float) -> dict[str, Any]:
    """Returns what is compared with a peer: seconds of compiling, and the median of tokens per second."""
    run = start_training(with_rows(config, rows))
    update_seconds = time_repeated(run.run_updates, seconds=seconds, at_least=1)
    tokens = rows * config.data.sequence_length * config.train.grad_accum_steps
    return {
        "dtype": config.model.dtype,
        "compile_seconds": run.compile_seconds,
        "tokens_per_second": tokens / update_seconds.median,
        **_peak_memory(run.memory),
    }


def count_cost(compiled: Any, config: Config) -> dict[str, float]:
    """Returns XLA's counts of FLOPs and bytes for a compiled step, all chunks of the loss included.

    XLA counts a loop's body once: so in the step, and so in a program of the loss alone, which says what to add.
    """
    length, rows, width = config.data.sequence_length, config.train.batch_size, config.model.d_model
    hidden_BTD = jax.ShapeDtypeStruct((rows, length, width), jnp.dtype(config.model.dtype))
    output_DV = jax.ShapeDtypeStruct((width, config.model.vocab_size), hidden_BTD.dtype)
    targets_BT = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    weights_BT = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    loss = jax.jit(jax.value_and_grad(next_token_loss, argnums=(0, 1), has_aux=True))
    one_chunk: Any = loss.lower(hidden_BTD, output_DV, targets_BT, weights_BT).compile().cost_analysis()
    step, others = compiled.cost_analysis(), num_chunks(rows, length) - 1
    return {name: step[name] + others * one_chunk[name] for name in ("flops", "bytes accessed")}


def find_flash_attention(config: Config, device: Any, compiled_text: str) -> dict[str, Any]:
    """Returns whether cuDNN's flash attention is expected in the compiled step, and how often it is called there.

    Raises `RuntimeError` when it is expected and some layer goes without, forward or backward: what would be timed is
    not what the config asks for.
    """
    if device.platform != "gpu":
        return {"expected": False, "calls_in_hlo": None}
    expected = uses_flash_attention(config.model, config.data.sequence_length, device)
    calls = count_flash_attention_calls(compiled_text)
    if expected and calls < 2 * config.model.num_layers:
        raise RuntimeError(
            f"the compiled step calls cuDNN's flash attention {calls} times; {config.model.num_layers} layers, forward "
            f"and backward, must call it {2 * config.model.num_layers} times"
        )
    return {"expected": expected, "calls_in_hlo": calls}


def describe_flops(config: Config) -> str:
    """Returns the formula of `flops_per_token` with the config's figures."""
    model, length = config.model, config.data.sequence_length
    split = split_flops_per_token(model, length)
    return (
        f"6 x {split.layers / 6:,.0f} (layers) + 6 x {length:,} x {model.num_heads * model.head_dim:,} x "
        f"{model.num_layers} (causal attention: context x width x layers) + 6 x {model.vocab_size:,} x "
        f"{model.d_model:,} (logits)"
    )


def _peak_memory(memory: StepMemory) -> dict[str, int | None]:
    """Returns bytes: what XLA plans for a step, the most the device's allocator gave, the most this process held."""
    return {
        "planned_bytes": memory.total_bytes,
        "device_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "process_bytes": peak_resident_bytes(),
    }
