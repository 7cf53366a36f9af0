"""The plan's figures by hand, against the objects that training uses, and on data that is there or is not."""

import dataclasses
import functools
import json
import math
import re
import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.tiny import CONFIGS, make_tiny_config, read_tiny_values
from tinystories_jax.analysis import plan as plan_module
from tinystories_jax.analysis import step_timing, timing, training_run
from tinystories_jax.analysis.plan import (
    ASSUMED_MFU,
    GPUS,
    Corpus,
    Plan,
    count_flops,
    count_parameters,
    count_state,
    count_work,
    describe_corpus,
    estimate_tokens,
    make_plan,
    scale_memory,
    time_on_gpu,
    time_work,
)
from tinystories_jax.analysis.plan_table import format_plan
from tinystories_jax.analysis.step_timing import Measurement, measure_training
from tinystories_jax.analysis.training_run import TrainingRun
from tinystories_jax.config import Config, resolve, with_data
from tinystories_jax.data.cache import num_blocks
from tinystories_jax.data.prepare import prepare_data
from tinystories_jax.data.stories import SeenStories, StoryReport, StorySource, iter_stories
from tinystories_jax.data.tokenizer import save_tokenizer, train_bpe
from tinystories_jax.errors import UserError
from tinystories_jax.model.transformer import num_params
from tinystories_jax.training.flops import PEAK_BF16_FLOPS, flops_per_token
from tinystories_jax.training.memory import compile_step, read_memory
from tinystories_jax.training.optim import make_optimizer
from tinystories_jax.training.retention import checkpoint_bytes
from tinystories_jax.training.steps import init_state

COUNTED = Corpus(num_tokens=40 * 16 + 1, caches_bytes=None, is_estimate=False, origin="counted", vocab_size=61)
UNKNOWN = dataclasses.replace(COUNTED, num_tokens=None)


def read_config(name: str, **overrides: Any) -> Config:
    """Returns configs/NAME.py resolved; `overrides` has fields with __ for the dot."""
    values: Any = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    values.update_from_flattened_dict({key.replace("__", "."): value for key, value in overrides.items()})
    return resolve(values)


@pytest.fixture
def top10k(tmp_path) -> Plan:
    return make_plan(read_config("top10k", data__cache_dir=str(tmp_path / "cache")), measure=False)


def tiny_config_on(folder: Path, **overrides: Any) -> Config:
    """Returns the smallest config, on 400 stories in `folder`."""
    for split, count in (("train", 400), ("valid", 20)):
        (folder / f"{split}.txt").write_text(
            "<|endoftext|>".join(f"Once upon a time there was a cat with {n} mice." for n in range(count))
        )
    values = read_tiny_values()
    values.data.update(
        source="files",
        train_files=str(folder / "train.txt"),
        valid_files=str(folder / "valid.txt"),
        cache_dir=str(folder / "cache"),
    )
    values.tokenizer.vocab_size = 280
    values.train.max_updates = 0
    values.update_from_flattened_dict({key.replace("__", "."): value for key, value in overrides.items()})
    return resolve(values)


def test_figures_of_the_recipe(top10k):
    assert top10k.parameters.total == 22_750_784
    assert top10k.parameters.embedding == 10_000 * 448
    assert top10k.flops.per_token_flops == pytest.approx(146.1e6, rel=1e-3)
    assert top10k.flops.training_flops == pytest.approx(3.4e17, rel=0.02)
    assert (top10k.work.tokens_per_micro_batch, top10k.work.tokens_per_update) == (32_768, 131_072)
    assert top10k.state.max_checkpoints == 2 + 1 + 1 + 5


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_parts_add_up(tie_embeddings):
    config = make_tiny_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, tie_embeddings=tie_embeddings))
    parameters = count_parameters(config.model)
    assert parameters.embedding + parameters.layers + parameters.output_matrix == parameters.total
    assert parameters.total == num_params(config.model)
    assert parameters.output_matrix == (0 if tie_embeddings else 61 * 32)

    flops = count_flops(config, count_work(config, COUNTED))
    parts = flops.layers_per_token_flops + flops.attention_per_token_flops + flops.logits_per_token_flops
    assert parts == flops.per_token_flops == flops_per_token(config.model, 16)
    assert flops.layers_per_token_flops == 6 * parameters.layers
    assert flops.training_flops == flops.per_token_flops * 20 * 2 * 4 * 16


def test_state_is_as_large_as_the_real_one():
    config = make_tiny_config()
    size = count_state(config, COUNTED)
    state = jax.jit(lambda: init_state(config, make_optimizer(config)))()
    assert size.total_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert size.parameters_bytes == size.accumulated_gradient_bytes == 4 * num_params(config.model)
    assert 0 <= size.moments_bytes - 2 * size.parameters_bytes < 64
    assert size.total_bytes == checkpoint_bytes(config)
    assert size.max_checkpoints_bytes == (2 + 1 + 1 + 4) * size.total_bytes
    assert count_state(config, UNKNOWN).max_checkpoints_bytes is None


def test_times_on_gpus_are_flops_by_peak_and_mfu(top10k):
    assert len(top10k.gpus) == 6
    for name, gpu in zip(GPUS, top10k.gpus, strict=True):
        speed = PEAK_BF16_FLOPS[GPUS[name]] * ASSUMED_MFU
        assert gpu.training_seconds == pytest.approx(top10k.flops.training_flops / speed)
        assert gpu.five_epochs_seconds == pytest.approx(
            5 * top10k.work.tokens_per_epoch * top10k.flops.per_token_flops / speed
        )
        assert gpu.update_seconds * top10k.work.updates == pytest.approx(gpu.training_seconds)
    half = time_on_gpu("H200", ASSUMED_MFU / 2, top10k.flops, top10k.work)
    assert half.training_seconds == pytest.approx(2 * top10k.gpus[-1].training_seconds)


@pytest.mark.parametrize("mfu", [0.0, 1e-320, -0.1, 1.01, math.nan])
def test_an_mfu_that_is_no_share_is_refused(mfu):
    with pytest.raises(UserError, match="--mfu"):
        make_plan(make_tiny_config(), mfu=mfu, measure=False)


def test_prepared_data_is_counted(tmp_path):
    config = tiny_config_on(tmp_path)
    data = prepare_data(config, show_progress=False, log=lambda line: None)
    plan = make_plan(config, measure=False)
    assert plan.corpus.num_tokens == len(data.train.tokens)
    assert plan.corpus.caches_bytes == sum(
        path.stat().st_size for cache in (data.train, data.valid) for path in cache.folder.glob("*.bin")
    )
    assert plan.corpus.vocab_size == data.tokenizer.vocab_size
    assert not plan.corpus.is_estimate
    schedule = with_data(
        config, vocab_size=data.tokenizer.vocab_size, num_blocks=num_blocks(len(data.train.tokens), 16)
    ).schedule
    assert schedule is not None
    work = plan.work
    assert (work.updates, work.warmup_updates) == (schedule.total_updates, schedule.warmup_updates)
    assert (work.blocks_per_epoch, work.epochs) == (schedule.num_blocks, schedule.epoch_at(schedule.total_updates))
    assert str(data.train.folder) in format_plan(plan)


def test_tinystories_without_a_cache_is_guessed_and_called_so(top10k):
    assert top10k.corpus.num_tokens == 470_000_000
    assert top10k.corpus.is_estimate
    text = format_plan(top10k)
    assert "about 470,000,000 tokens, by the vocabulary's size; no token cache yet" in text
    assert "about 17,930" in text


def test_without_caches_the_vocabulary_is_that_of_the_tokenizer_that_is_given(tmp_path):
    tokenizer = train_bpe(["Once upon a time Anna had a red ball."] * 9, vocab_size=300)
    given = {"tokenizer__path": str(save_tokenizer(tokenizer, tmp_path)), "data__cache_dir": str(tmp_path)}
    plan = make_plan(read_config("top10k", **given), measure=False)
    vocab_size = tokenizer.vocab_size
    assert vocab_size <= 300
    assert plan.corpus.vocab_size == vocab_size
    assert plan.parameters.embedding == vocab_size * read_config("top10k").model.d_model
    assert plan.corpus.num_tokens == estimate_tokens(2_100_000, vocab_size)


def test_what_is_not_measured_needs_no_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "synthetic_tokens", None)
    config = read_config("quickstart", data__sequence_length=1_048_576, data__cache_dir=str(tmp_path))
    assert make_plan(config, measure=False).not_measured == "--nomeasure"


def test_updates_that_are_set_are_no_guess(tmp_path):
    plan = make_plan(read_config("cpu_real", data__cache_dir=str(tmp_path)), measure=False)
    assert (plan.work.updates, plan.work.updates_are_estimate, plan.corpus.is_estimate) == (400, False, True)
    assert "about 400" not in format_plan(plan)


def test_some_stories_of_tinystories_are_guessed_in_proportion(tmp_path):
    config = read_config("top10k", data__max_stories=21_000, data__cache_dir=str(tmp_path))
    assert describe_corpus(config, None).num_tokens == 4_700_000


def test_smaller_vocabularies_are_estimated_to_take_more_tokens(tinystories_data):
    source = StorySource("files", "train", str(tinystories_data / "train.txt"), max_stories=2_000)
    stories = list(iter_stories(source, StoryReport(), SeenStories()))
    sizes = (257, 512, 1_024, 2_048, 10_000)
    counted = {size: sum(map(len, train_bpe(stories, vocab_size=size).encode_batch(stories))) for size in sizes}
    whole = estimate_tokens(1_000_000, 10_000)
    for size in sizes:
        expected = counted[size] / counted[10_000]
        assert estimate_tokens(1_000_000, size) / whole == pytest.approx(expected, rel=0.05), size


@pytest.mark.parametrize(("vocab_size", "token_bytes"), [(512, 2), (1_000_000, 4)])
def test_the_caches_are_estimated_from_the_stories_of_both_splits(tmp_path, vocab_size, token_bytes):
    few_stories, many_stories = 1_000, 1_000_000
    few, many = (
        describe_corpus(
            read_config("top10k", data__max_stories=n, data__cache_dir=str(tmp_path), tokenizer__vocab_size=vocab_size),
            None,
        )
        for n in (few_stories, many_stories)
    )
    assert few.num_tokens is not None
    assert few.caches_bytes is not None
    assert many.num_tokens is not None
    assert many.caches_bytes is not None
    of_more_stories = (many.num_tokens - few.num_tokens) * token_bytes + (many_stories - few_stories) * 8
    assert many.caches_bytes - few.caches_bytes == pytest.approx(of_more_stories)
    # All validation stories are there, however few of the others are.
    assert few.caches_bytes > 2 * few.num_tokens * token_bytes


def test_other_stories_without_a_cache_are_unknown(tmp_path):
    config = tiny_config_on(tmp_path)
    plan = make_plan(config, measure=False)
    assert (
        plan.corpus.num_tokens
        is plan.corpus.caches_bytes
        is plan.work.updates
        is plan.work.tokens_per_epoch
        is plan.work.epochs
        is None
    )
    assert plan.flops.training_flops is plan.gpus[0].training_seconds is plan.gpus[0].five_epochs_seconds is None
    assert plan.work.tokens_per_update == 4 * 2 * 16
    assert plan.gpus[0].update_seconds > 0
    assert "unknown until python scripts/prepare.py has run" in format_plan(plan)


def test_max_updates_are_known_whatever_the_data(tmp_path):
    config = tiny_config_on(tmp_path, train__max_updates=6)
    work = make_plan(config, measure=False).work
    assert (work.updates, work.warmup_updates, work.training_tokens) == (6, 3, 6 * 4 * 2 * 16)
    assert work.epochs is None


def test_no_length_is_refused_before_the_data_is_known(tmp_path):
    updates = 1_000_000_000
    work = make_plan(tiny_config_on(tmp_path, train__max_updates=updates), measure=False).work
    assert (work.updates, work.training_tokens, work.epochs) == (updates, updates * 4 * 2 * 16, None)


def test_a_source_that_cannot_be_read_is_refused(tmp_path):
    config = tiny_config_on(tmp_path, data__train_files=str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="matches no file"):
        make_plan(config, measure=False)


def list_files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Plan:
    """Returns a plan with all figures, and has seen that making it wrote nothing."""
    folder = tmp_path_factory.mktemp("measured")
    config = tiny_config_on(folder)
    prepare_data(config, show_progress=False, log=lambda line: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_timing, "_TIMING_SECONDS", 0.1)
        patch.chdir(folder)
        before = list_files(folder)
        plan = make_plan(config)
        assert list_files(folder) == before
    return plan


def test_real_steps_are_timed(measured):
    found, here, work = measured.measurement, measured.here, measured.work
    assert found is not None
    assert here is not None
    assert found.rows == work.rows_per_micro_batch == 4
    assert 0 < found.micro_step_seconds < 5
    assert found.tokens_per_second == pytest.approx(4 * 16 / found.micro_step_seconds)
    assert here.update_seconds == pytest.approx(2 * found.micro_step_seconds)
    assert here.training_seconds == pytest.approx(work.updates * here.update_seconds)
    assert found.compile_seconds > 0
    if jax.default_backend() == "cpu":  # nobody knows the peak of one
        assert found.mfu is None
        assert (measured.mfu, "assumption" in measured.mfu_origin) == (0.313, True)


def test_memory_is_that_of_the_donated_state_and_more(measured):
    memory = measured.measurement.memory
    assert memory.arguments_bytes >= memory.aliased_bytes >= measured.state.total_bytes
    assert memory.temporaries_bytes > 0
    assert measured.micro_batch_memory_bytes == memory.total_bytes


def one_layer_config() -> Config:
    config = make_tiny_config()
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1))


def measure_tiny(log: list[str]) -> Measurement:
    config = one_layer_config()
    return measure_training(config, np.arange(40 * 16 + 1) % config.model.vocab_size, log.append)


@functools.cache
def compile_once(config: Config, rows: int) -> Any:
    return compile_step(config, rows)


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(training_run, "compile_step", compile_once)
    monkeypatch.setattr(step_timing, "_TIMING_SECONDS", 0.0)
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 1e-9)
    monkeypatch.setattr(step_timing, "_FIRST_STEP_FLOPS", 1.0)
    monkeypatch.setattr(step_timing, "_FIRST_STEP_FLOPS_ON_CPU", 1.0)
    return monkeypatch


def test_cheap_steps_grow_to_all_rows(hurried):
    lines: list[str] = []
    assert measure_tiny(lines).rows == 4
    assert lines[:2] == ["compiling a micro-step of 1 of 4 rows", "compiling a micro-step of 4 of 4 rows"]


def test_the_first_run_of_a_program_says_nothing_of_a_step(hurried):
    run, warm = TrainingRun.run, []

    def run_slowly_at_first(training, num_micro_steps):
        seconds = run(training, num_micro_steps)
        if training.rows in warm:
            return seconds
        warm.append(training.rows)
        return 1000.0

    hurried.setattr(TrainingRun, "run", run_slowly_at_first)
    found = measure_tiny([])
    assert found.rows == 4
    assert found.micro_step_seconds < 5


def test_costly_steps_stay_small_and_are_scaled_by_tokens(hurried, measured, tmp_path):
    hurried.setattr(step_timing, "_STEP_SECONDS", 0.0)
    found = measure_tiny([])
    assert found.rows == 1
    assert scale_memory(found, 4) == found.memory.total_bytes + 3 * found.memory.temporaries_bytes
    here = time_work("here", None, found.tokens_per_second, measured.work)
    assert here.update_seconds == pytest.approx(2 * 4 * found.micro_step_seconds)
    text = format_plan(dataclasses.replace(measured, measurement=found, here=here))
    assert "scaled by tokens to 4 rows" in text


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a CPU's limits are set")
def test_a_micro_batch_that_does_not_fit_shrinks(hurried):
    hurried.setattr(step_timing, "_FIRST_STEP_FLOPS_ON_CPU", 1e12)
    config = one_layer_config()
    too_much = read_memory(compile_once(config, config.train.batch_size)).total_bytes
    hurried.setattr(step_timing, "_CPU_MEMORY_BYTES", too_much - 1)
    found = measure_tiny([])
    assert found.rows == config.train.batch_size - 1
    assert found.memory.total_bytes < too_much


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a CPU's limits are set")
def test_a_row_that_does_not_fit_is_told_and_the_rest_is_planned(hurried, tmp_path):
    hurried.setattr(step_timing, "_CPU_MEMORY_BYTES", 1000.0)
    plan = make_plan(tiny_config_on(tmp_path, model__num_layers=1))
    assert plan.measurement is plan.here is None
    assert "one row takes" in plan.not_measured
    assert plan.not_measured in format_plan(plan)


def test_json_and_text_have_the_same_figures(measured):
    values = json.loads(json.dumps(dataclasses.asdict(measured), allow_nan=False))
    text = set(re.findall(r"\d[\d,]*(?:\.\d+)?", format_plan(measured)))
    for name, part in (("embedding", "parameters"), ("total", "parameters"), ("updates", "work")):
        assert f"{values[part][name]:,}" in text
    assert f"{values['state']['total_bytes'] / 1e3:,.1f}" in text
    assert f"{values['flops']['per_token_flops'] / 1e3:,.1f}" in text
    assert f"{values['measurement']['tokens_per_second']:,.0f}" in text
    assert f"{values['measurement']['compile_seconds']:.1f}" in text
    for times in values["gpus"]:
        assert f"{times['tokens_per_second']:,.0f}" in text
    fewer = dataclasses.replace(measured, work=dataclasses.replace(measured.work, epochs=0.434))
    assert "\nCost at 5 epochs, seconds:" in format_plan(measured)
    assert "\nCost at 5 epochs instead of 0.43, seconds:" in format_plan(fewer)


def test_text_fits_on_a_screen(top10k, measured):
    larger = dataclasses.replace(
        measured,
        parameters=dataclasses.replace(measured.parameters, output_matrix=1),
        work=dataclasses.replace(measured.work, rows_per_micro_batch=64),
    )
    quick, slow = (
        dataclasses.replace(
            measured,
            work=dataclasses.replace(measured.work, epochs=0.4321),
            here=dataclasses.replace(measured.here, five_epochs_seconds=seconds),
        )
        for seconds in (0.854, 59e6)
    )
    for plan in (top10k, measured, larger, quick, slow):
        lines = format_plan(plan).splitlines()
        assert len(lines) <= 40
        # The first two hold names as long as the user has made them.
        assert [line for line in lines[2:] if len(line) > 120] == []
