"""What the real `train_step` needs of the device's memory, by XLA's own analysis; it is compiled and nothing is run."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np

from tinystories_jax.config import MAX_GRAD_ACCUM_STEPS, Config
from tinystories_jax.errors import is_out_of_memory
from tinystories_jax.evaluation.validation import article_mask
from tinystories_jax.training.optim import make_optimizer
from tinystories_jax.training.steps import init_state, make_train_step

_ROOT = Path("/")
SMALLER = "a smaller model or a shorter --config.data.sequence_length"  # what is left where one row does not fit


@dataclass(frozen=True)
class StepMemory:
    """XLA's memory analysis of a compiled `train_step`. Aliased outputs take the place of donated arguments."""

    arguments_bytes: int
    outputs_bytes: int
    aliased_bytes: int
    temporaries_bytes: int
    total_bytes: int


def compile_step(config: Config, rows: int) -> Any:
    """Returns `train_step` compiled for micro-batches of `rows` rows, as training does; nothing is allocated."""
    optimizer = make_optimizer(config)
    train_step = make_train_step(config, optimizer, for_many_updates=True)
    state = jax.eval_shape(lambda: init_state(config, optimizer))
    block = jax.ShapeDtypeStruct((rows, config.data.sequence_length + 1), np.int32)
    return train_step.lower(state, block, article_mask((), config.model.vocab_size)).compile()


def read_memory(compiled: Any) -> StepMemory:
    """Returns the memory of what `compile_step` returned."""
    analysis = compiled.memory_analysis()
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    aliased, temporaries = analysis.alias_size_in_bytes, analysis.temp_size_in_bytes
    return StepMemory(arguments, outputs, aliased, temporaries, arguments + outputs - aliased + temporaries)


def step_memory(config: Config, rows: int) -> StepMemory:
    """Returns what `train_step` needs for micro-batches of `rows` rows."""
    return read_memory(compile_step(config, rows))


def device_memory_bytes() -> int:
    """Returns the memory that this device lets a program use; where the device does not say, the machine's, or what
    the system lets this process have of it."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_control_group_limits()])


def _control_group_limits() -> Iterator[int]:
    """Yields the memory limits of this process's control groups, as containers have them, and of all groups above.

    Linux says in /proc/self/cgroup which groups these are: `0::GROUP` of version 2, `NUMBER:memory:GROUP` of version 1.
    In a container its own group may stand at the root and those above out of sight: what cannot be read is no limit.
    """
    try:
        lines = os.fsdecode((_ROOT / "proc/self/cgroup").read_bytes()).split("\n")
    except OSError:
        return
    for line in lines:
        number, controllers, group = (*line.split(":", 2), "", "")[:3]
        if "memory" in controllers.split(","):
            tree, limit = _ROOT / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        elif number == "0":
            tree, limit = _ROOT / "sys/fs/cgroup", "memory.max"
        else:
            continue
        for folder in (PurePosixPath(group), *PurePosixPath(group).parents):
            # Of version 2 the text is "max" where there is no limit.
            with contextlib.suppress(OSError, ValueError):
                if (num_bytes := int((tree / folder.relative_to("/") / limit).read_text())) > 0:
                    yield num_bytes


def try_step_bytes(config: Config, rows: int) -> int | None:
    """Returns the bytes that `train_step` needs for micro-batches of `rows` rows; None where compiling it takes more
    memory than there is."""
    try:
        return step_memory(config, rows).total_bytes
    except jax.errors.JaxRuntimeError as error:  # compiling tries kernels out, in what memory is left
        if not is_out_of_memory(error):
            raise
        return None


def advise_what_fits(config: Config) -> str:
    """Returns what to do where the step of `config` does not fit, after compiling smaller micro-batches."""
    fitting, remat = fitting_micro_batch(config), "" if config.model.remat else "--config.model.remat=True"
    if fitting is None:
        return f"no smaller micro-batch fits; try {SMALLER}" + f", or {remat}" * bool(remat)
    return (
        f"this fits: --config.train.batch_size={fitting[0]} --config.train.grad_accum_steps={fitting[1]}, "
        "the same update in smaller micro-batches, in another --workdir if this one has checkpoints"
        + f"; or try {remat}, slower"
        * bool(remat)
    )


def fitting_micro_batch(config: Config) -> tuple[int, int] | None:
    """Returns the rows and the number of the largest smaller micro-batches that make the same update and fit.

    None where not even one row fits. Each is about half of the one before, and compiled to be sure.
    """
    limit = device_memory_bytes()
    for rows, micro_steps in smaller_micro_batches(config):
        needed = try_step_bytes(config, rows)
        if needed is not None and needed <= limit:
            return rows, micro_steps
    return None


def smaller_micro_batches(config: Config) -> Iterator[tuple[int, int]]:
    """Yields rows and number of micro-batches of the same update, each at most half as large as the one before."""
    per_update, rows = config.train.batch_size * config.train.grad_accum_steps, config.train.batch_size
    while rows > 1:
        rows = max(size for size in range(1, rows // 2 + 1) if per_update % size == 0)
        if per_update // rows > MAX_GRAD_ACCUM_STEPS:
            return
        yield rows, per_update // rows
