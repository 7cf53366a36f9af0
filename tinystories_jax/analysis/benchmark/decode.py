"""Writing: the latency of one text, the throughput of many, the first token, and a token's time by its position."""

import itertools
import statistics
import time
from typing import Any

import jax

from tinystories_jax.analysis.benchmark.inputs import PROMPT_LENGTH, num_new_tokens
from tinystories_jax.analysis.timing import spread_of, take_samples
from tinystories_jax.config import Config
from tinystories_jax.model.generate import Sampling, decode_form, generate_chunks
from tinystories_jax.model.transformer import Params, init_params

_NO_TOKEN = -1  # as the end token: every text gets all its tokens
_SHORTEST_PROMPT = 32
# The slowest of many parts is looked for, and in few samples it is found by accident.
_POSITION_SECONDS, _MOST_POSITION_SAMPLES = 40.0, 60


def measure_decode(config: Config, batch_sizes: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """Returns the figures of writing with fresh parameters; all but positions are sampled for about `seconds` each."""
    params = _make_params(config)
    return {
        "dtype": decode_form(config.model, 1).config.dtype,
        "prompt_length": PROMPT_LENGTH,
        "batches": [time_decoding(config, rows, seconds, params) for rows in batch_sizes],
        "first_token": _time_first_tokens(config, seconds, params),
        "positions": time_positions(config, params),
    }


def time_decoding(config: Config, rows: int, seconds: float, params: Params | None = None) -> dict[str, Any]:
    """Returns the figures of writing `rows` texts at once, prompts included; compiling stands apart."""
    params = _make_params(config) if params is None else params
    new_tokens = num_new_tokens(config)

    def write() -> float:
        return sum(_write(params, config, rows, PROMPT_LENGTH, new_tokens))

    first_call = write()
    took = spread_of(take_samples(write, seconds=seconds))
    return {
        "rows": rows,
        "matrix_form": decode_form(config.model, rows).kept_as,
        "new_tokens": new_tokens,
        "compile_seconds": max(first_call - took.median, 0.0),
        "token_seconds": took.scaled(1 / new_tokens)._asdict(),
        "tokens_per_second": took.rate(rows * new_tokens)._asdict(),
    }


def _time_first_tokens(config: Config, seconds: float, params: Params) -> list[dict[str, Any]]:
    """Returns the time to the first new token by prompt length: a prompt for each compiled length, which it fills."""
    context, figures = config.data.sequence_length, []
    lengths = [2**power - 1 for power in range(1, context.bit_length() + 1) if _SHORTEST_PROMPT <= 2**power < context]
    for length in [*lengths, context - 1]:

        def write(length: int = length) -> float:
            return sum(_write(params, config, 1, length, 1))

        first_call = write()
        took = spread_of(take_samples(write, seconds=seconds / 4))
        figures.append(
            {
                "prompt_length": length,
                "compile_seconds": max(first_call - took.median, 0.0),
                "seconds": took._asdict(),
            }
        )
    return figures


def time_positions(config: Config, params: Params | None = None) -> list[dict[str, Any]]:
    """Returns the seconds of a token at batch 1 by position: sixteenths of the context, from `first` to `last`.

    The first part is left out, since the prompt is part of it. `against_first` is the median over the texts of a part's
    time in the time of the first part that is given, of the same text: a machine that is slow for a while slows both.
    """
    params = _make_params(config) if params is None else params
    context = config.data.sequence_length
    chunk = max(context // 16, 1)
    room = context - PROMPT_LENGTH
    runs: list[list[float]] = []

    def write() -> float:
        runs.append(_write(params, config, 1, PROMPT_LENGTH, room, chunk))
        return sum(runs[-1])

    write()
    runs.clear()
    take_samples(write, seconds=_POSITION_SECONDS, at_most=_MOST_POSITION_SAMPLES)
    figures = []
    for index, samples in enumerate(zip(*runs, strict=True)):
        num_tokens = min(chunk, room - index * chunk)
        first = PROMPT_LENGTH + index * chunk
        # What is left at the end may be too short to be timed.
        if index and num_tokens == chunk:
            took = spread_of(samples).scaled(1 / num_tokens)
            ratio = statistics.median(run[index] / run[1] for run in runs)
            places = {"first": first, "last": first + num_tokens - 1}
            figures.append(places | {"token_seconds": took._asdict(), "against_first": ratio})
    return figures


def _write(
    params: Params, config: Config, rows: int, prompt_length: int, new_tokens: int, chunk: int | None = None
) -> list[float]:
    """Returns the seconds of each `chunk` new tokens a row (None: all at once), as they reach the host."""
    stamps = [time.perf_counter()]
    chunks = generate_chunks(
        params,
        [[index % config.model.vocab_size for index in range(prompt_length)]] * rows,
        config.model,
        Sampling(temperature=config.sample.temperature),
        key=jax.random.key(0),
        end_token=_NO_TOKEN,
        context_length=config.data.sequence_length,
        max_new_tokens=new_tokens,
        chunk_size=chunk or new_tokens,
    )
    for texts in chunks:
        stamps.append(time.perf_counter())
        assert len(texts) == rows
    assert len(texts[-1]) == prompt_length + new_tokens
    return [after - before for before, after in itertools.pairwise(stamps)]


def _make_params(config: Config) -> Params:
    return jax.block_until_ready(init_params(config.model, jax.random.key(0)))
