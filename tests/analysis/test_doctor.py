"""The doctor finds each planted fault, and nothing else; and finds nothing where nothing is planted."""

import dataclasses
import json
import os
import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from tests import planted
from tests.test_cli import error_lines, run_script
from tests.tiny import CONFIGS, read_tiny_values
from tinystories_jax.analysis import doctor, learning_checks, logits_checks, machine_checks, schedule_check
from tinystories_jax.analysis.check import Check, Outcome, summarize, to_json
from tinystories_jax.config import Config, resolve
from tinystories_jax.data.prepare import PreparedData, find_data, prepare_data
from tinystories_jax.errors import UserError
from tinystories_jax.training import memory
from tinystories_jax.training.retention import checkpoint_bytes, max_checkpoints

ALL = [
    *("tokenizer and cache", "data", "target shift", "causality", "loss at initialisation", "overfit", "accumulation"),
    *("schedule", "decode parity", "precision", "machine"),
]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory) -> Iterator[None]:
    """Lets all tests here share compiled programs, which are looked up by what is compiled, faults included."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    jax.clear_caches()
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def plant(monkeypatch) -> Iterator[Callable[[Any], None]]:
    """Plants a fault until the end of the test; what was traced without it is forgotten, as is what was with it."""

    def plant_one(fault: Callable[[planted.Patch], None]) -> None:
        fault(monkeypatch.setattr)
        jax.clear_caches()

    yield plant_one
    monkeypatch.undo()
    jax.clear_caches()


def write_stories(path: Path, first: int, count: int) -> Path:
    things = ("a red ball", "the old cat", "an apple", "a big dog", "the blue cup")
    stories = [
        f"Once upon a time Anna had {things[n % 5]}. She gave it to the boy with {n} hats.\nThe boy liked "
        f"{things[(n // 5) % 5]} and said it was {n * 7}."
        for n in range(first, first + count)
    ]
    path.write_text("\n<|endoftext|>\n".join(stories))
    return path


@pytest.fixture
def config(tmp_path) -> Config:
    """Returns a config whose data is not prepared yet."""
    values = read_tiny_values()
    values.data.update(source="files", cache_dir=str(tmp_path / "cache"))
    values.data.train_files = str(write_stories(tmp_path / "train.txt", 0, 200))
    values.data.valid_files = str(write_stories(tmp_path / "valid.txt", 1_000, 20))
    values.tokenizer.vocab_size = 300
    return resolve(values)


def check_all(config: Config, tmp_path: Path) -> list[Check]:
    return list(doctor.run_checks(config, doctor.try_find_data(config), workdir=tmp_path / "run", fast=True))


def outcomes(checks: list[Check], outcome: Outcome) -> list[str]:
    return [check.name for check in checks if check.outcome == outcome]


def the_failed(checks: list[Check]) -> Check:
    (failed,) = [check for check in checks if check.outcome == Outcome.FAIL]
    return failed


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
    """Returns a folder for tokenizers and token caches that several configs have in common."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.py")))
def test_all_fast_checks_pass_on_each_config(name, tmp_path, tinystories_data, cache_dir, capsys):
    values = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    values.data.cache_dir = str(cache_dir)
    if values.data.source == "hub":
        values.data.update(
            source="files",
            train_files=str(tinystories_data / "train.txt"),
            valid_files=str(tinystories_data / "valid.txt"),
        )
    if values.tokenizer.source == "hub":
        values.tokenizer.update(source="files", train_files=str(tinystories_data / "train.txt"))
    config = resolve(values)
    prepare_data(config, show_progress=False)
    jax.clear_caches()
    checks = check_all(config, tmp_path)
    with capsys.disabled():
        print(f"\nfast checks of configs/{name}.py: {summarize(checks)}")
    assert [(check.name, check.outcome, check.note) for check in checks if check.outcome != Outcome.PASS] == []
    assert [check.name for check in checks] == ALL


def test_without_data_what_needs_it_is_skipped_with_the_reason(config, tmp_path):
    before = sorted(path for path in tmp_path.rglob("*"))
    checks = check_all(config, tmp_path)
    assert outcomes(checks, Outcome.FAIL) == []
    assert outcomes(checks, Outcome.SKIP) == ["tokenizer and cache", "data"]
    assert all("scripts/prepare.py" in check.note for check in checks if check.outcome == Outcome.SKIP)
    by_data = dataclasses.replace(config, train=dataclasses.replace(config.train, max_updates=0))
    by_data = doctor._complete(by_data, None)
    planned = [*doctor._plan_data_checks(by_data, None), *doctor._plan_model_checks(by_data, None, "no data")]
    assert [check.name for check in planned if check.missing] == ["tokenizer and cache", "data", "schedule"]
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("fault", "name", "said"),
    [
        (planted.labels_shifted_twice, "target shift", "token t + 2"),
        (planted.no_causal_mask, "causality", "tokens that come after"),
        (planted.large_embeddings, "loss at initialisation", "initialisation"),
        (planted.validation_shifted, "target shift", "asks for other tokens than training teaches"),
        (planted.attention_not_updated, "overfit", "layers.0.self_attn"),
        (
            planted.attention_without_gradient,
            "overfit",
            "layers.0.self_attn.k_proj.kernel, layers.0.self_attn.q_proj.kernel",
        ),
        (planted.gradients_summed, "accumulation", "averaged"),
        (planted.schedule_of_half_the_length, "schedule", "does not fit the run"),
        (planted.kv_cache_off_by_one, "decode parity", "KV cache"),
        (planted.bfloat16_optimizer_state, "precision", "mu"),
        (planted.no_end_tokens, "tokenizer and cache", "0 end tokens for 200 stories"),
        (planted.a_block_left_out, "data", "exactly once"),
    ],
)
def test_a_planted_fault_fails_its_own_check(config, tmp_path, plant, fault, name, said):
    plant(fault)
    prepare_data(config, show_progress=False)
    checks = check_all(config, tmp_path)
    assert outcomes(checks, Outcome.FAIL) == [name]
    assert said in the_failed(checks).note
    may_be_skipped = {"causality": ["decode parity"], "tokenizer and cache": ["data"]}
    assert outcomes(checks, Outcome.SKIP) == may_be_skipped.get(name, [])


def change(config: Config, section: str, **values: Any) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_runs_have_a_sound_schedule(config, total):
    short = change(change(config, "train", max_updates=total), "optim", max_grad_norm=1e-6, warmup_updates=1)
    assert schedule_check.check_schedule(doctor._complete(short, None)).outcome == Outcome.PASS


def test_a_schedule_that_the_config_did_not_ask_for_is_found(config):
    complete = doctor._complete(config, None)
    assert complete.schedule is not None
    for values in ({"total_updates": 40}, {"warmup_updates": 0}):
        schedule = dataclasses.replace(complete.schedule, **values)
        check = schedule_check.check_schedule(dataclasses.replace(complete, schedule=schedule))
        assert check.outcome == Outcome.FAIL
        assert "config and data ask for 20 with 4" in check.note
    idle = change(complete, "optim", learning_rate=0.0, min_learning_rate=0.0)
    assert "nothing would be learnt" in schedule_check.check_schedule(idle).note


def test_narrow_heads_and_untied_models_are_not_ill(config):
    narrow = doctor._complete(change(config, "model", d_model=32, num_heads=16, num_kv_heads=16), None)
    assert learning_checks.check_target_shift(narrow, None, None).outcome == Outcome.PASS
    wide = change(config, "model", d_model=1024, num_heads=16, num_kv_heads=16, num_layers=1, tie_embeddings=False)
    assert learning_checks.check_initial_loss(doctor._complete(wide, None), None).outcome == Outcome.PASS


def test_a_leak_in_one_block_of_queries_is_found(config, plant):
    plant(planted.one_block_leaks)
    long = doctor._complete(change(config, "data", sequence_length=128), None)
    assert logits_checks.check_causality(long).outcome == Outcome.FAIL


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU packs")
def test_a_fault_of_writing_in_bfloat16_alone_is_found(config, tmp_path, plant):
    rounded = change(config, "model", dtype="bfloat16")
    assert logits_checks.check_decode_parity(doctor._complete(rounded, None)).outcome == Outcome.PASS
    plant(planted.packed_halves_swapped)
    checks = check_all(rounded, tmp_path)
    assert outcomes(checks, Outcome.FAIL) == ["decode parity"]
    figures = the_failed(checks).figures
    assert figures["largest_difference"] < 1e-3
    assert figures["greedy_tokens_that_differ"] == 0
    assert min(figures["largest_difference_rounded"].values()) > 0.2


def test_a_fault_of_caches_that_grow_is_found(config, plant):
    plant(planted.cache_forgets_when_it_grows)
    long = doctor._complete(change(config, "data", sequence_length=160), None)
    check = logits_checks.check_decode_parity(long)
    assert check.outcome == Outcome.FAIL
    assert check.figures["largest_difference"] < 1e-3
    assert check.figures["greedy_tokens_that_differ"] > 0


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (planted.validation_drops_its_last_batch, "validation counts"),
        (planted.padding_counts_in_validation, "of 1,000 tokens"),
    ],
)
def test_a_fault_of_what_validation_counts_is_found(config, plant, fault, said):
    plant(fault)
    check = learning_checks.check_target_shift(doctor._complete(config, None), None, None)
    assert check.outcome == Outcome.FAIL
    assert said in check.note


def test_norms_that_only_decay_are_found(config, plant):
    plant(planted.norms_only_decay)
    check = learning_checks.check_overfit(doctor._complete(config, None))
    assert check.outcome == Outcome.FAIL
    assert "norm.scale" in check.note


@pytest.mark.parametrize("length", [2, 3, 5, 9, 13])
def test_short_contexts_can_be_known_by_heart(config, length):
    short = doctor._complete(change(config, "data", sequence_length=length), None)
    assert learning_checks.check_overfit(short).outcome == Outcome.PASS


def test_what_is_not_a_number_never_passes(config, plant):
    plant(planted.logits_not_finite)
    complete = doctor._complete(config, None)
    for check in (
        logits_checks.check_causality(complete),
        logits_checks.check_decode_parity(complete),
        learning_checks.check_initial_loss(complete, None),
    ):
        assert check.outcome == Outcome.FAIL
        assert "not finite" in check.note
        assert "NaN" not in to_json([check])


def test_a_workdir_below_a_file_is_found(config, tmp_path):
    (tmp_path / "file").write_text("")
    complete = doctor._complete(config, None)
    check = machine_checks.check_machine(complete, tmp_path / "file" / "run", measure_memory=False)
    assert check.outcome == Outcome.FAIL
    assert "--workdir" in check.note


def test_parameters_that_are_never_updated_fail_what_trains(config, tmp_path, plant):
    plant(planted.parameters_not_updated)
    assert outcomes(check_all(config, tmp_path), Outcome.FAIL) == ["target shift", "overfit", "accumulation"]


def test_a_swapped_tokenizer_is_found(config, tmp_path):
    data = prepare_data(config, show_progress=False)
    other = dataclasses.replace(config.data, train_files=config.data.valid_files)
    swapped_in = prepare_data(dataclasses.replace(config, data=other), show_progress=False).tokenizer
    assert swapped_in.vocab_size == data.tokenizer.vocab_size
    swapped = dataclasses.replace(data, tokenizer=swapped_in)
    checks = list(doctor.run_checks(config, swapped, workdir=tmp_path / "run", fast=True))
    assert outcomes(checks, Outcome.FAIL) == ["tokenizer and cache"]
    assert f"made with tokenizer {data.tokenizer.sha256[:16]}" in the_failed(checks).note


def other_source(config: Config, tmp_path: Path) -> tuple[PreparedData, PreparedData]:
    """Returns the config's own data and that of other stories, under one tokenizer."""
    own = prepare_data(config, show_progress=False)
    (path,) = (tmp_path / "cache" / "tokenizers").iterdir()
    tokenizer = dataclasses.replace(config.tokenizer, path=str(path))
    files = dataclasses.replace(config.data, train_files=str(write_stories(tmp_path / "other.txt", 300, 200)))
    return own, prepare_data(dataclasses.replace(config, tokenizer=tokenizer, data=files), show_progress=False)


def test_a_cache_of_another_source_is_found(config, tmp_path):
    own, other = other_source(config, tmp_path)
    mixed = dataclasses.replace(own, train=other.train)
    checks = list(doctor.run_checks(config, mixed, workdir=tmp_path / "run", fast=True))
    assert outcomes(checks, Outcome.FAIL) == ["tokenizer and cache"]
    assert "made from another source" in the_failed(checks).note


def damage_by_exchange(own: PreparedData, other: PreparedData) -> str:
    shutil.rmtree(own.train.folder)
    shutil.copytree(other.train.folder, own.train.folder)
    return "fingerprint"


def damage_by_truncation(own: PreparedData, other: PreparedData) -> str:
    del other
    path = own.train.folder / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-100])
    return "tokens.bin has"


@pytest.mark.parametrize("damage", [damage_by_exchange, damage_by_truncation])
def test_a_cache_damaged_on_the_disk_is_found_before_it_is_used(config, tmp_path, damage):
    said = damage(*other_source(config, tmp_path))
    checks = check_all(config, tmp_path)
    assert outcomes(checks, Outcome.FAIL) == ["tokenizer and cache"]
    assert outcomes(checks, Outcome.SKIP) == ["data"]
    assert said in the_failed(checks).note
    assert "--rebuild" in the_failed(checks).note


def test_validation_stories_in_the_training_split_are_found(config, tmp_path):
    both = dataclasses.replace(config.data, valid_files=config.data.train_files)
    config = dataclasses.replace(config, data=both)
    prepare_data(config, show_progress=False)
    checks = check_all(config, tmp_path)
    assert outcomes(checks, Outcome.FAIL) == ["data"]
    assert "200 of 200 validation stories" in the_failed(checks).note


def test_a_file_in_the_place_of_the_checkpoints_is_found(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    check = machine_checks.check_machine(doctor._complete(config, None), tmp_path / "run", measure_memory=False)
    assert check.outcome == Outcome.FAIL
    assert "move it away" in check.note
    (tmp_path / "run" / "checkpoints").unlink()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path)
    check = machine_checks.check_machine(doctor._complete(config, None), tmp_path / "run", measure_memory=False)
    assert check.outcome == Outcome.FAIL
    assert "is a link" in check.note


@pytest.mark.parametrize("target", ["nowhere", "run"])
def test_a_link_that_leads_nowhere_in_the_place_of_the_run_is_found(config, tmp_path, target):
    (tmp_path / "run").symlink_to(tmp_path / target)
    check = machine_checks.check_machine(doctor._complete(config, None), tmp_path / "run", measure_memory=False)
    assert check.outcome == Outcome.FAIL
    assert f"{tmp_path / 'run'} is no folder that can be written" in check.note


def test_too_little_room_for_the_checkpoints_is_found(config, tmp_path, monkeypatch):
    monkeypatch.setattr(machine_checks, "_free_disk", lambda workdir: 10**6)
    checks = check_all(config, tmp_path)
    assert outcomes(checks, Outcome.FAIL) == ["machine"]
    assert "--config.checkpoint.keep" in the_failed(checks).note


def test_checkpoints_that_are_there_need_no_more_room(config, tmp_path, monkeypatch):
    complete, run = doctor._complete(config, None), tmp_path / "run"

    def needed() -> int:
        return machine_checks.check_machine(complete, run, measure_memory=False).figures["disk_needed_bytes"]

    size, at_first = checkpoint_bytes(complete), needed()
    assert at_first == max_checkpoints(complete) * size + machine_checks._MARGIN_BYTES
    (run / "checkpoints" / "4" / "params").mkdir(parents=True)
    (run / "checkpoints" / "4" / "params" / "array").write_bytes(bytes(2 * size))
    assert needed() == at_first - 2 * size
    monkeypatch.setattr(machine_checks, "_free_disk", lambda workdir: at_first - 2 * size)
    assert machine_checks.check_machine(complete, run, measure_memory=False).outcome == Outcome.PASS
    # A new one is written before an old one goes.
    os.truncate(run / "checkpoints" / "4" / "params" / "array", at_first)  # quicker than so many bytes
    assert needed() == size + machine_checks._MARGIN_BYTES


FITS = "this fits: --config.train.batch_size=2 --config.train.grad_accum_steps=4"


def check_memory(config: Config, tmp_path: Path) -> Check:
    return machine_checks.check_machine(doctor._complete(config, None), tmp_path, measure_memory=True)


def test_memory_that_does_not_suffice_is_found_with_the_micro_batch_that_fits(config, monkeypatch, tmp_path):
    needed = memory.step_memory(doctor._complete(config, None), 4).total_bytes
    monkeypatch.setattr(memory, "device_memory_bytes", lambda: needed - 1)
    check = check_memory(config, tmp_path)
    assert check.outcome == Outcome.FAIL
    assert FITS in check.note


@pytest.mark.parametrize(("first_too_large", "said"), [(4, FITS), (1, "no smaller micro-batch fits")])
def test_a_step_too_large_to_compile_is_found_with_what_fits(config, monkeypatch, tmp_path, first_too_large, said):
    monkeypatch.setattr(memory, "compile_step", compile_below(first_too_large))
    check = check_memory(config, tmp_path)
    assert check.outcome == Outcome.FAIL
    assert check.note.startswith("compiling a step of train.batch_size=4")
    assert said in check.note


def test_one_row_that_fits_alone_is_no_problem(config, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "compile_step", compile_below(2))
    check = check_memory(change(config, "train", batch_size=1), tmp_path)
    assert check.outcome == Outcome.PASS
    assert check.figures["largest_micro_batch"] == 1


def test_a_check_for_which_the_model_is_too_large_fails_with_the_way_out():
    def measure() -> Check:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    (check,) = doctor._make([doctor._Planned("precision", measure)], set())
    assert check.outcome == Outcome.FAIL
    assert check.note.endswith(f"try {memory.SMALLER}")


def compile_below(first_too_large: int) -> Callable[[Config, int], Any]:
    """Returns `compile_step` of a device on which so many rows or more are too large to compile."""
    compile_step = memory.compile_step

    def compile_or_fail(config: Config, rows: int) -> Any:
        if rows >= first_too_large:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
        return compile_step(config, rows)

    return compile_or_fail


def flags_of(config: Config, *more: str) -> list[str]:
    data = config.data
    return [
        *(
            "--config=configs/quickstart.py",
            "--config.data.source=files",
            f"--config.data.train_files={data.train_files}",
        ),
        *(f"--config.data.valid_files={data.valid_files}", f"--config.data.cache_dir={data.cache_dir}"),
        *("--config.data.sequence_length=32", "--config.tokenizer.vocab_size=300", "--config.model.d_model=32"),
        *("--config.model.num_layers=2", "--config.model.num_heads=2", "--config.model.d_ff=64"),
        *("--config.train.max_updates=4", "--config.eval.every=2", "--config.sample.max_new_tokens=4"),
        *more,
    ]


@pytest.mark.slow
def test_train_makes_the_fast_checks_once_and_doctor_all_of_them(config, tmp_path):
    run = tmp_path / "run"
    result = run_script("train", *flags_of(config, f"--workdir={run}"))
    assert result.returncode == 0, result.stderr
    assert "11 passed, 0 failed, 0 skipped" in result.stderr
    again = run_script("train", *flags_of(config, f"--workdir={run}"))
    assert "passed" not in again.stderr
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = run_script("doctor", *flags_of(config, f"--checkpoint={run}", "--json"))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert [check["name"] for check in found["checks"]] == [*ALL, "checkpoint"]
    assert {check["outcome"] for check in found["checks"]} == {"PASS"}
    assert not found["failed"]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    # Another loss in the log than the checkpoint has.
    log = run / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps({**row, **{k: 1.0 for k in row if k == "valid/loss"}}) + "\n" for row in rows))
    check = machine_checks.check_checkpoint(data_of(config), run)
    assert check.outcome == Outcome.FAIL
    assert "metrics.jsonl says 1.0" in check.note
    log.write_text(log.read_text().replace("1.0}", "NaN}").replace('"valid/loss": 1.0', '"valid/loss": NaN'))
    assert "which is no loss" in machine_checks.check_checkpoint(data_of(config), run).note
    log.unlink()
    assert "is missing" in machine_checks.check_checkpoint(data_of(config), run).note
    assert machine_checks.check_checkpoint(None, run, "no cache").outcome == Outcome.FAIL


def test_a_checkpoint_that_is_none_is_refused_before_the_first_check(config, tmp_path):
    shown: list[str] = []
    with pytest.raises(UserError, match="no run with checkpoints stands there"):
        doctor.examine(config, workdir=tmp_path / "run", checkpoint=tmp_path / "none", show=shown.append)
    assert shown == []


def data_of(config: Config) -> PreparedData:
    data = find_data(config)
    assert data is not None
    return data


@pytest.mark.slow
def test_train_refuses_what_the_doctor_finds_ill_unless_told_otherwise(config, tmp_path):
    same = flags_of(config, f"--config.data.valid_files={config.data.train_files}", f"--workdir={tmp_path / 'run'}")
    result = run_script("train", *same)
    assert "(data)" in error_lines(result, after_log=True)[0]
    assert "--nodoctor" in result.stderr
    assert not (tmp_path / "run").exists()
    assert run_script("doctor", *same).returncode == 2
    result = run_script("train", *same, "--nodoctor")
    assert result.returncode == 0, result.stderr


@pytest.fixture
def with_muon(config) -> Config:
    return change(config, "optim", muon_learning_rate=0.02)


def test_a_run_with_muon_is_found_sound(with_muon, tmp_path):
    assert outcomes(check_all(with_muon, tmp_path), Outcome.FAIL) == []


def test_a_schedule_of_which_muon_sees_another_is_found(with_muon, plant):
    plant(planted.muon_schedule_of_half_the_length)
    check = schedule_check.check_schedule(doctor._complete(with_muon, None))
    assert check.outcome == Outcome.FAIL
    applied, in_layers = check.figures["applied"], check.figures["in_layers"]
    assert applied == pytest.approx(check.figures["expected"], rel=1e-3)
    assert in_layers[12] == pytest.approx(4e-4, rel=1e-3)
