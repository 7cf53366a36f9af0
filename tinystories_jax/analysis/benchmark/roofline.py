"""The two ceilings of a compiled program on this device: its matmul rate and its memory bandwidth.

Williams et al. 2009, doi:10.1145/1498765.1498785: a program takes at least FLOPs / rate and at least bytes / bandwidth.
"""

import functools
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tinystories_jax.analysis.timing import Spread, time_repeated
from tinystories_jax.model.matmul import rounded_einsum
from tinystories_jax.training.steps import step_compiler_options

# Large enough to leave every cache, and to fill the device.
_COPY_BYTES, _COPY_BYTES_ON_CPU = 2**32, 2**29
_MATMUL_WIDTH, _MATMUL_WIDTH_ON_CPU = 8192, 2048
_SECONDS = 1.0


class DeviceRates(NamedTuple):
    """What this device was measured to do. Bytes are those read plus those written, of `x + 1` in place; FLOP/s are
    those of a square matmul, in float32 at JAX's default precision (TF32 on NVIDIA GPUs from Ampere on)."""

    copy_bytes_per_second: Spread
    matmul_flops_per_second: dict[str, Spread]  # by dtype


class Roofline(NamedTuple):
    """`bound` is compute or memory, whichever takes longer; `reached` the share of that bound, above 1 where XLA's
    bytes are read from a cache. Seconds are those of one run of the program."""

    counted_flops: float  # by XLA, which sees no FLOPs in calls of other libraries
    formula_flops: float
    counted_bytes: float  # likewise: operands and results of every operation, as if no cache held them
    compute_seconds: float  # of the larger count
    memory_seconds: float
    bound: str
    reached: float


def measure_rates() -> DeviceRates:
    """Times a copy and square matmuls on the first device."""
    on_cpu = jax.default_backend() == "cpu"
    width = _MATMUL_WIDTH_ON_CPU if on_cpu else _MATMUL_WIDTH
    return DeviceRates(
        copy_bytes_per_second=_measure_copy(_COPY_BYTES_ON_CPU if on_cpu else _COPY_BYTES),
        matmul_flops_per_second={dtype: _measure_matmul(width, dtype) for dtype in ("bfloat16", "float32")},
    )


def roofline(
    analysis: dict[str, Any], *, formula_flops: float, seconds: float, rates: DeviceRates, dtype: str
) -> Roofline:
    """Returns how close a program that multiplies in `dtype` and takes `seconds` comes to its bound.

    `analysis` holds "flops" and "bytes accessed", as the `cost_analysis()` of a compiled program.
    """
    counted_flops, counted_bytes = analysis["flops"], analysis["bytes accessed"]
    compute_seconds = max(counted_flops, formula_flops) / rates.matmul_flops_per_second[dtype].median
    memory_seconds = counted_bytes / rates.copy_bytes_per_second.median
    return Roofline(
        counted_flops=counted_flops,
        formula_flops=formula_flops,
        counted_bytes=counted_bytes,
        compute_seconds=compute_seconds,
        memory_seconds=memory_seconds,
        bound="compute" if compute_seconds >= memory_seconds else "memory",
        reached=max(compute_seconds, memory_seconds) / seconds,
    )


def count_flash_attention_calls(compiled_text: str) -> int:
    """Returns how often a compiled program calls cuDNN's fused attention, forward or backward."""
    return len(re.findall(r'custom_call_target="__cudnn\$fmha\w*"', compiled_text))


def _measure_copy(num_bytes: int) -> Spread:
    # In place: fresh pages would be a matter of the allocator and not of the memory.
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    return _time_chain(add, jnp.zeros(num_bytes // 4, jnp.float32)).rate(2 * num_bytes)


def _measure_matmul(width: int, dtype: str) -> Spread:
    # Scaled so that a product has entries of the size of its factors', however many follow each other.
    matrix = jax.random.normal(jax.random.key(0), (width, width), jnp.dtype(dtype)) * width**-0.5
    matmul = jax.jit(functools.partial(rounded_einsum, "NK,KM->NM"), compiler_options=step_compiler_options(dtype))
    return _time_chain(lambda product: matmul(product, matrix), matrix).rate(2 * width**3)


def _time_chain(call: Callable[[jax.Array], jax.Array], array: jax.Array) -> Spread:
    """Returns the seconds of one of many calls in a row, each of which takes what the one before has returned."""

    def run(repetitions: int) -> float:
        nonlocal array
        began = time.perf_counter()
        for _ in range(repetitions):
            array = call(array)
        jax.block_until_ready(array)
        return time.perf_counter() - began

    run(1)
    return time_repeated(run, seconds=_SECONDS, at_least=5)
