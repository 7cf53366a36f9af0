"""The doctor: measures, on a user's own config, data and checkpoint, the faults that train without an error.

train.py runs the fast checks before the first update of a run, doctor.py all of them. Nothing here changes a run,
builds data or asks the network.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from tinystories_jax.analysis.check import HEADER, Check, Outcome, format_check, skip, summarize
from tinystories_jax.analysis.data_checks import check_data, check_tokenizer_and_cache
from tinystories_jax.analysis.learning_checks import (
    check_accumulation,
    check_initial_loss,
    check_overfit,
    check_target_shift,
)
from tinystories_jax.analysis.logits_checks import check_causality, check_decode_parity, check_precision
from tinystories_jax.analysis.machine_checks import check_checkpoint, check_machine
from tinystories_jax.analysis.schedule_check import check_schedule
from tinystories_jax.analysis.small_copy import num_rows_measured
from tinystories_jax.config import Config, with_data, with_unknown_data
from tinystories_jax.data.cache import micro_batch_at, num_blocks
from tinystories_jax.data.prepare import PreparedData, find_data, find_vocab_size
from tinystories_jax.errors import UserError, is_out_of_memory
from tinystories_jax.training.memory import SMALLER
from tinystories_jax.training.restore import require_checkpoints, require_same_config

_NO_DATA = "no token cache yet: python scripts/prepare.py with the same --config flags builds it"
_CACHE = "tokenizer and cache"


class _Planned(NamedTuple):
    """A check to be made, unless there is a reason not to: something missing, or another check that failed."""

    name: str
    measure: Callable[[], Check]
    missing: str = ""
    needs: str = ""


def examine(
    config: Config, *, workdir: Path, checkpoint: Path | None = None, verbose: bool = False, show: Callable[[str], None]
) -> list[Check]:
    """Makes all checks on what is there, shows the table line by line, and returns them; changes nothing.

    Raises `UserError`, before the first, where `checkpoint` is no run with checkpoints.
    """
    if checkpoint is not None:
        require_checkpoints(checkpoint)
    checks = run_checks(config, try_find_data(config), workdir=workdir, checkpoint=checkpoint, fast=False)
    return _show(checks, show, verbose)


def require_health(config: Config, data: PreparedData, workdir: Path) -> None:
    """Makes the fast checks on what training is about to use and shows them on stderr; raises `UserError` on a FAIL."""
    checks = run_checks(config, data, workdir=workdir, fast=True)
    checks = _show(checks, lambda line: print(line, file=sys.stderr, flush=True), verbose=False)
    failed = [check.name for check in checks if check.outcome == Outcome.FAIL]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(checks)} checks failed ({', '.join(failed)}), and they do not mend "
            "themselves while training; mend what the table above says, or train all the same with --nodoctor"
        )


def try_find_data(config: Config) -> PreparedData | UserError | None:
    """Returns what training would reuse, None when it would be built, or what is wrong with it."""
    try:
        return find_data(config)
    except UserError as error:
        return error


def _show(checks: Iterator[Check], show: Callable[[str], None], verbose: bool) -> list[Check]:
    show(HEADER)
    made = []
    for check in checks:
        show(format_check(check, verbose=verbose))
        made.append(check)
    show(summarize(made))
    return made


def run_checks(
    config: Config,
    found: PreparedData | UserError | None,
    *,
    workdir: Path,
    checkpoint: Path | None = None,
    fast: bool,
) -> Iterator[Check]:
    """Yields the checks in the order of the way from a story to a block, an update and a story again.

    `config` is as resolved, without what the data tells; `found` is what `try_find_data` found. The fast checks leave
    out the memory of the compiled step, which takes two compilations at full size, and the checkpoint.
    """
    try:
        config = _complete(config, found if isinstance(found, PreparedData) else None)
    except UserError as error:  # fewer tokens than a block, or too many epochs of them
        found, config = error, _complete(config, None)
    failed: set[str] = set()
    yield from _make(_plan_data_checks(config, found), failed)
    # Tokens that are not to be trusted would make other checks fail for no reason of their own.
    data = found if isinstance(found, PreparedData) and _CACHE not in failed else None
    why_no_data = f"{_CACHE} failed" if failed else _NO_DATA
    planned = _plan_model_checks(config, data, why_no_data)
    planned.append(_Planned("machine", lambda: check_machine(config, workdir, measure_memory=not fast)))
    if not fast:
        planned.append(_plan_checkpoint(config, data, checkpoint, why_no_data))
    yield from _make(planned, failed)


def _plan_model_checks(config: Config, data: PreparedData | None, why_no_data: str) -> list[_Planned]:
    block = None if data is None else _first_block(config, data)
    tokenizer = None if data is None else data.tokenizer
    unknown = "" if data or config.train.max_updates else f"its length follows from the data: {why_no_data}"
    return [
        _Planned("target shift", lambda: check_target_shift(config, block, tokenizer)),
        _Planned("causality", lambda: check_causality(config)),
        _Planned("loss at initialisation", lambda: check_initial_loss(config, block, why_no_data)),
        _Planned("overfit", lambda: check_overfit(config)),
        _Planned("accumulation", lambda: check_accumulation(config)),
        _Planned("schedule", lambda: check_schedule(config), missing=unknown),
        # A forward that sees the future has no counterpart in decoding.
        _Planned("decode parity", lambda: check_decode_parity(config), needs="causality"),
        _Planned("precision", lambda: check_precision(config, block)),
    ]


def _plan_data_checks(config: Config, found: PreparedData | UserError | None) -> list[_Planned]:
    def measure(check: Callable[[Config, PreparedData], Check]) -> Callable[[], Check]:
        def run() -> Check:
            if isinstance(found, UserError):
                raise found
            assert found is not None
            return check(config, found)

        return run

    missing = _NO_DATA if found is None else ""
    return [
        _Planned(_CACHE, measure(check_tokenizer_and_cache), missing=missing),
        _Planned("data", measure(check_data), missing=missing, needs=_CACHE),
    ]


def _plan_checkpoint(config: Config, data: PreparedData | None, checkpoint: Path | None, why_no_data: str) -> _Planned:
    if checkpoint is None:
        return _Planned("checkpoint", lambda: skip("checkpoint", "none given; --checkpoint=RUN checks one"))

    def check() -> Check:
        require_same_config(checkpoint, config)
        return check_checkpoint(data, checkpoint, why_no_data)

    return _Planned("checkpoint", check)


def _make(planned: list[_Planned], failed: set[str]) -> Iterator[Check]:
    """Yields each planned check, and adds to `failed` the names of those that failed."""
    for name, measure, missing, needs in planned:
        if missing or needs in failed:
            yield skip(name, missing or f"{needs} failed; mend that first")
            continue
        began = time.perf_counter()
        try:
            check = measure()
        except (UserError, OSError) as error:
            problems = error.problems if isinstance(error, UserError) else (f"{error.filename}: {error.strerror}",)
            check = Check(name, Outcome.FAIL, "cannot be used", note="; ".join(problems))
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Of the checks at full size: the machine's, which compiles the rows of a micro-batch, does not raise it.
            note = f"the model, or a row of this context, does not fit; try {SMALLER}"
            check = Check(name, Outcome.FAIL, "out of memory", note=note)
        if check.outcome == Outcome.FAIL:
            failed.add(name)
        yield dataclasses.replace(check, seconds=time.perf_counter() - began)


def _complete(config: Config, data: PreparedData | None) -> Config:
    """Returns `config` with vocabulary and schedule: those of the data, or what stands in for them without it."""
    if data is None:
        return with_unknown_data(config, vocab_size=_vocab_size(config))
    blocks = num_blocks(len(data.train.tokens), config.data.sequence_length)
    return with_data(config, vocab_size=data.tokenizer.vocab_size, num_blocks=blocks)


def _vocab_size(config: Config) -> int:
    try:
        return find_vocab_size(config)
    except UserError:  # of which the check of tokenizer and cache tells
        return config.tokenizer.vocab_size


def _first_block(config: Config, data: PreparedData) -> np.ndarray:
    """Returns the first rows that the run trains on, a micro-batch or more."""
    num_rows = max(config.train.batch_size, num_rows_measured(config))
    return micro_batch_at(data.train.tokens, config, 0, num_rows=num_rows)
