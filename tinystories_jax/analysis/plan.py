"""What a config is going to cost, before an hour is spent: parameters, memory, disk, updates, FLOPs and minutes.

It reads the config and the token cache, if there is one, and times the very `train_step` that training uses. It builds,
fetches and writes nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from tinystories_jax.analysis.benchmark.inputs import synthetic_tokens
from tinystories_jax.analysis.step_timing import Measurement, measure_training
from tinystories_jax.config import Config, ModelConfig, with_data, with_unknown_data
from tinystories_jax.data.cache import cache_bytes, num_blocks
from tinystories_jax.data.prepare import PreparedData, find_data, find_vocab_size
from tinystories_jax.errors import UserError
from tinystories_jax.model.transformer import init_params
from tinystories_jax.training.flops import PEAK_BF16_FLOPS, PEAK_SOURCE, split_flops_per_token
from tinystories_jax.training.optim import make_optimizer
from tinystories_jax.training.retention import max_checkpoints
from tinystories_jax.training.steps import init_state

_LEAST_MFU = 1e-6
ASSUMED_MFU = 0.313  # of configs/top10k.py on an NVIDIA H200, by its training step (docs/benchmarks.md)
GPUS = {
    "RTX 3090": "NVIDIA GeForce RTX 3090",
    "RTX 4090": "NVIDIA GeForce RTX 4090",
    "RTX 5090": "NVIDIA GeForce RTX 5090",
    "A100": "NVIDIA A100-SXM4-80GB",
    "H100": "NVIDIA H100 80GB HBM3",
    "H200": "NVIDIA H200",
}
_FORMULA = "6 x parameters of layers + 6 x context x width x layers (causal attention) + 6 x vocabulary x width"
# The training split, its tokens under a vocabulary of 10,000 of its own, and the validation split.
_TINYSTORIES, _TINYSTORIES_TOKENS, _TINYSTORIES_STORIES = "roneneldan/TinyStories", 470_000_000, 2_100_000
_TINYSTORIES_VALID_STORIES = 22_000
# Tokens under a vocabulary of other sizes, 1 being those under 10,000: `train_bpe` on 6,955 stories of the training
# split, which are then encoded (1,361,088 tokens under 10,000). A straight line over the logarithm of the size is up to
# a tenth too high between 257 and 512, and within 3 % from there on. 11,864 tokens make each word of these stories one.
_TOKENS_BY_VOCAB_SIZE = {
    257: 4.10,
    300: 2.70,
    512: 1.70,
    1_024: 1.29,
    2_048: 1.12,
    4_096: 1.03,
    10_000: 1.00,
    32_000: 1.00,
}


@dataclass(frozen=True)
class Corpus:
    """The training split, and the token caches of both. Until they are there, `num_tokens` and `caches_bytes` are
    estimates or None, `vocab_size` that of the tokenizer that is there, or what was asked."""

    num_tokens: int | None
    caches_bytes: int | None
    is_estimate: bool
    origin: str
    vocab_size: int


@dataclass(frozen=True)
class Parameters:
    """Counts. `output_matrix` is 0 where the embedding serves as one; norm scales count as layers."""

    embedding: int
    layers: int
    output_matrix: int
    total: int


@dataclass(frozen=True)
class StateSize:
    """The training state in memory, which is what a checkpoint holds. None: the count of epochs is unknown."""

    parameters_bytes: int
    moments_bytes: int  # of the optimizer: two of each parameter, or one where Muon moves it
    accumulated_gradient_bytes: int
    total_bytes: int  # some counters included
    max_checkpoints: int | None
    max_checkpoints_bytes: int | None


@dataclass(frozen=True)
class Work:
    """Counts of what training goes through; None where only the data can tell."""

    sequence_length: int
    rows_per_micro_batch: int
    micro_batches_per_update: int
    tokens_per_micro_batch: int
    tokens_per_update: int
    tokens_per_epoch: int | None
    blocks_per_epoch: int | None
    updates: int | None
    warmup_updates: int | None
    updates_are_estimate: bool
    epochs: float | None
    training_tokens: int | None


@dataclass(frozen=True)
class Flops:
    """FLOPs of training, forward and backward."""

    layers_per_token_flops: float
    attention_per_token_flops: float
    logits_per_token_flops: float
    per_token_flops: float
    training_flops: float | None
    formula: str


@dataclass(frozen=True)
class Times:
    """What training steps alone take on one device; None where only the data can tell."""

    device: str
    peak_flops_per_second: float | None
    tokens_per_second: float
    update_seconds: float
    training_seconds: float | None
    five_epochs_seconds: float | None


@dataclass(frozen=True)
class Plan:
    """All figures. `measurement` and `here` are None where `not_measured` says why."""

    device: str
    corpus: Corpus
    parameters: Parameters
    state: StateSize
    work: Work
    flops: Flops
    measurement: Measurement | None
    not_measured: str
    micro_batch_memory_bytes: int | None  # of all rows of a micro-batch: in proportion, where fewer were timed
    here: Times | None
    mfu: float
    mfu_origin: str
    peak_source: str
    gpus: tuple[Times, ...]


def make_plan(
    config: Config, *, mfu: float | None = None, measure: bool = True, log: Callable[[str], None] = lambda line: None
) -> Plan:
    """Returns the plan of `config`; `mfu` is the share of their peak that the GPUs of the table are to reach.

    Without it they get the one measured here, or `ASSUMED_MFU` on a device of unknown peak. Raises `UserError` for data
    that cannot be read.
    """
    if mfu is not None and not _LEAST_MFU <= mfu <= 1:
        raise UserError(f"--mfu={mfu} must be from {_LEAST_MFU} to 1; for instance --mfu={ASSUMED_MFU}")
    data = find_data(config)
    corpus = describe_corpus(config, data)
    config = with_corpus(config, corpus)
    work = count_work(config, corpus)
    flops = count_flops(config, work)
    measurement, not_measured = _try_to_measure(config, data, log) if measure else (None, "--nomeasure")
    device = jax.devices()[0].device_kind
    mfu, mfu_origin = _choose_mfu(mfu, measurement)
    return Plan(
        device=device,
        corpus=corpus,
        parameters=count_parameters(config.model),
        state=count_state(config, corpus),
        work=work,
        flops=flops,
        measurement=measurement,
        not_measured=not_measured,
        micro_batch_memory_bytes=measurement and scale_memory(measurement, config.train.batch_size),
        here=measurement and time_work(device, PEAK_BF16_FLOPS.get(device), measurement.tokens_per_second, work),
        mfu=mfu,
        mfu_origin=mfu_origin,
        peak_source=PEAK_SOURCE,
        gpus=tuple(time_on_gpu(name, mfu, flops, work) for name in GPUS),
    )


def _try_to_measure(
    config: Config, data: PreparedData | None, log: Callable[[str], None]
) -> tuple[Measurement | None, str]:
    """Returns the measurement, or why there is none: what the config alone tells stands all the same."""
    tokens = synthetic_tokens(config) if data is None else data.train.tokens
    try:
        return measure_training(config, tokens, log), ""
    except UserError as error:
        return None, str(error)


def describe_corpus(config: Config, data: PreparedData | None) -> Corpus:
    """Returns what is known of the stories: counted, documented, or nothing."""
    if data is not None:
        vocab_size, manifests = data.tokenizer.vocab_size, (data.train.manifest, data.valid.manifest)
        caches = sum(cache_bytes(vocab_size, num_stories=m.num_stories, num_tokens=m.num_tokens) for m in manifests)
        return Corpus(data.train.manifest.num_tokens, caches, False, f"counted in {data.train.folder}", vocab_size)
    vocab_size = find_vocab_size(config)
    if config.data.source != "hub" or config.data.hub_name != _TINYSTORIES:
        return Corpus(None, None, False, "unknown until python scripts/prepare.py has run", vocab_size)
    num_stories = min(config.data.max_stories or _TINYSTORIES_STORIES, _TINYSTORIES_STORIES)
    all_stories = num_stories + _TINYSTORIES_VALID_STORIES
    num_tokens, all_tokens = (estimate_tokens(stories, vocab_size) for stories in (num_stories, all_stories))
    caches = cache_bytes(vocab_size, num_stories=all_stories, num_tokens=all_tokens)
    origin = "by the vocabulary's size; no token cache yet"
    return Corpus(num_tokens, caches, True, origin, vocab_size)


def estimate_tokens(num_stories: int, vocab_size: int) -> int:
    """Returns about how many tokens so many stories of TinyStories are under a vocabulary of their own; under one of
    other text they are some more."""
    sizes, ratios = zip(*_TOKENS_BY_VOCAB_SIZE.items(), strict=True)
    ratio = float(np.interp(np.log(vocab_size), np.log(sizes), ratios))
    return round(_TINYSTORIES_TOKENS * ratio * num_stories / _TINYSTORIES_STORIES)


def with_corpus(config: Config, corpus: Corpus) -> Config:
    """Returns `config` with its schedule, or with what stands in for it where the count of tokens is unknown."""
    if corpus.num_tokens is None:
        return with_unknown_data(config, vocab_size=corpus.vocab_size)
    blocks = num_blocks(corpus.num_tokens, config.data.sequence_length)
    return with_data(config, vocab_size=corpus.vocab_size, num_blocks=blocks)


def count_parameters(model: ModelConfig) -> Parameters:
    """Returns the counts of parameters, from the shapes alone."""
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in shapes.items()}
    embedding, output_matrix, total = sizes["embed_tokens"], sizes.get("lm_head", 0), sum(sizes.values())
    return Parameters(embedding, total - embedding - output_matrix, output_matrix, total)


def count_state(config: Config, corpus: Corpus) -> StateSize:
    """Returns the size of the state, from the shapes alone, of a config from `with_corpus`."""
    optimizer = make_optimizer(config)
    state = jax.eval_shape(lambda: init_state(config, optimizer))
    total = _bytes_of(state)
    checkpoints = None if corpus.num_tokens is None else max_checkpoints(config)
    return StateSize(
        parameters_bytes=_bytes_of(state.params),
        moments_bytes=_bytes_of(state.opt_state.inner_opt_state),
        accumulated_gradient_bytes=_bytes_of(state.opt_state.acc_grads),
        total_bytes=total,
        max_checkpoints=checkpoints,
        max_checkpoints_bytes=None if checkpoints is None else checkpoints * total,
    )


def _bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def count_work(config: Config, corpus: Corpus) -> Work:
    """Returns the counts of a config from `with_corpus`."""
    schedule, length = config.schedule, config.data.sequence_length
    assert schedule is not None
    known = corpus.num_tokens is not None
    is_set = config.train.max_updates > 0
    ends = known or is_set
    tokens_per_update = schedule.blocks_per_update * length
    return Work(
        sequence_length=length,
        rows_per_micro_batch=config.train.batch_size,
        micro_batches_per_update=config.train.grad_accum_steps,
        tokens_per_micro_batch=config.train.batch_size * length,
        tokens_per_update=tokens_per_update,
        tokens_per_epoch=schedule.num_blocks * length if known else None,
        blocks_per_epoch=schedule.num_blocks if known else None,
        updates=schedule.total_updates if ends else None,
        warmup_updates=schedule.warmup_updates if ends else None,
        updates_are_estimate=corpus.is_estimate and not is_set,
        epochs=schedule.epoch_at(schedule.total_updates) if known else None,
        training_tokens=schedule.total_updates * tokens_per_update if ends else None,
    )


def count_flops(config: Config, work: Work) -> Flops:
    """Returns the FLOPs of one token and of the whole training."""
    split = split_flops_per_token(config.model, config.data.sequence_length)
    training = None if work.training_tokens is None else sum(split) * work.training_tokens
    return Flops(split.layers, split.attention, split.logits, sum(split), training, _FORMULA)


def time_on_gpu(name: str, mfu: float, flops: Flops, work: Work) -> Times:
    """Returns the times of a GPU that reaches the share `mfu` of its dense bf16 peak."""
    peak = PEAK_BF16_FLOPS[GPUS[name]]
    return time_work(name, peak, peak * mfu / flops.per_token_flops, work)


def time_work(device: str, peak: float | None, tokens_per_second: float, work: Work) -> Times:
    """Returns the times of `work` at a speed."""
    training, epoch = work.training_tokens, work.tokens_per_epoch
    return Times(
        device=device,
        peak_flops_per_second=peak,
        tokens_per_second=tokens_per_second,
        update_seconds=work.tokens_per_update / tokens_per_second,
        training_seconds=None if training is None else training / tokens_per_second,
        five_epochs_seconds=None if epoch is None else 5 * epoch / tokens_per_second,
    )


def _choose_mfu(asked: float | None, measurement: Measurement | None) -> tuple[float, str]:
    if asked is not None:
        return asked, "given by --mfu"
    if measurement is not None and measurement.mfu is not None:
        return measurement.mfu, "measured on this device; that others reach it is an assumption"
    assumed = "an assumption: the main recipe's on an H200, small models and float32 reach less"
    return ASSUMED_MFU, f"{assumed}; --mfu=SHARE sets another"


def scale_memory(measurement: Measurement, batch_size: int) -> int:
    """Returns the bytes of a step of `batch_size` rows, its temporaries in proportion to the rows."""
    more_rows = batch_size - measurement.rows
    return measurement.memory.total_bytes + measurement.memory.temporaries_bytes * more_rows // measurement.rows
