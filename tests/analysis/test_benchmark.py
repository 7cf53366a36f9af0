"""The benchmark's figures on tiny shapes, against formulas, counts and planted rates; and what the script refuses."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jax.profiler import ProfileData

from tests.test_cli import error_line, run_script
from tests.tiny import read_tiny_values
from tinystories_jax.analysis import timing
from tinystories_jax.analysis.benchmark import data, growth, roofline, start, train
from tinystories_jax.analysis.benchmark import run as benchmark_run
from tinystories_jax.analysis.benchmark.child import call_as_script, peak_resident_bytes, run_in_child
from tinystories_jax.analysis.benchmark.decode import measure_decode
from tinystories_jax.analysis.benchmark.inputs import num_new_tokens, synthetic_tokens, with_synthetic_data
from tinystories_jax.analysis.benchmark.roofline import DeviceRates, count_flash_attention_calls
from tinystories_jax.analysis.benchmark.run import MODES, run_benchmark
from tinystories_jax.analysis.benchmark.table import format_section
from tinystories_jax.analysis.benchmark.train import cheap_rows, find_flash_attention, measure_train
from tinystories_jax.analysis.timing import Spread, spread_of, take_samples, time_repeated
from tinystories_jax.config import Config, resolve, with_data
from tinystories_jax.data.cache import num_blocks
from tinystories_jax.errors import UserError
from tinystories_jax.model import loss
from tinystories_jax.model.transformer import num_params
from tinystories_jax.training.flops import PEAK_BF16_FLOPS, flops_per_token
from tinystories_jax.training.memory import compile_step

PEAK = 1e12
RATES = DeviceRates(spread_of([1e10]), {"float32": spread_of([1e11]), "bfloat16": spread_of([2e11])})


def tiny_config(**model: Any) -> Config:
    values = read_tiny_values()
    values.tokenizer.vocab_size = 300
    values.model.update(**model)
    return with_synthetic_data(resolve(values))


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trace")


@pytest.fixture(scope="module")
def trained(trace) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PEAK_BF16_FLOPS, jax.devices()[0].device_kind, PEAK)
        patch.setattr(train, "measure_rates", lambda: RATES)
        patch.setattr(timing, "_SAMPLE_SECONDS", 1e-9)
        return measure_train(tiny_config(), 3, 0.01, str(trace))


def test_a_spread_is_that_of_its_values():
    spread = spread_of([4.0, 1.0, 2.0])
    assert spread == Spread(2.0, 1.0, 4.0, 3)
    assert spread.scaled(0.5) == Spread(1.0, 0.5, 2.0, 3)
    # The slowest sample has the lowest rate.
    assert spread.rate(8) == Spread(4.0, 2.0, 8.0, 3)


@pytest.mark.parametrize(("each", "number"), [(0.125, 8), (5.0, 3), (1e-9, 20)])
def test_samples_are_taken_until_the_time_is_spent_within_bounds(each, number):
    assert len(take_samples(lambda: each, seconds=1.0)) == number


@pytest.mark.parametrize(("each", "counts"), [(0.0625, [1, 4, 4, 4]), (1.0, [1, 1, 1, 1])])
def test_short_repetitions_are_sampled_in_rows(each, counts):
    asked: list[int] = []

    def run(count: int) -> float:
        asked.append(count)
        return count * each

    assert time_repeated(run, seconds=0.0) == Spread(each, each, each, 3)
    assert asked == counts


def test_synthetic_tokens_are_the_blocks_of_the_schedule():
    config = tiny_config()
    tokens = synthetic_tokens(config)
    assert config.schedule is not None
    assert num_blocks(len(tokens), config.data.sequence_length) == config.schedule.num_blocks
    assert tokens.max() < config.model.vocab_size == 300


def test_a_text_gets_what_the_context_has_room_for():
    config = tiny_config()
    assert num_new_tokens(config) == 16 - 8
    few = dataclasses.replace(config, sample=dataclasses.replace(config.sample, max_new_tokens=3))
    assert num_new_tokens(few) == 3


def test_training_figures_follow_from_each_other(trained):
    tokens = 3 * 16
    micro_step, update = trained["micro_step_seconds"], trained["update_seconds"]
    assert trained["tokens_per_second"]["median"] == pytest.approx(tokens / micro_step["median"])
    assert trained["tokens_per_second"]["min"] == pytest.approx(tokens / micro_step["max"])
    assert update["median"] == pytest.approx(2 * micro_step["median"])
    assert micro_step["num_samples"] >= 3
    assert trained["num_params"] == num_params(tiny_config().model)
    assert 0 < trained["data_wait_fraction"] < 1
    assert trained["compile_seconds"] > 0


def test_one_update_is_profiled_on_request(trained, trace):
    profile = ProfileData.from_file(str(next(trace.rglob("*.xplane.pb"))))
    names = [event.name for plane in profile.planes for line in plane.lines for event in line.events]
    assert sum("train_step" in name for name in names) >= 2  # micro-steps
    with pytest.raises(UserError, match=r"--trace=x: 'decode' does not train"):
        next(run_benchmark(tiny_config(), "decode", rounds=1, peer=False, trace="x", log=print))


def test_mfu_is_flops_per_second_by_the_peak(trained):
    flops = flops_per_token(tiny_config().model, 16)
    assert trained["flops_per_token"] == flops
    assert trained["mfu"] == pytest.approx(trained["tokens_per_second"]["median"] * flops / PEAK)


def test_the_formula_shown_gives_the_figure(trained):
    # "6 x 12,345 (layers) + 6 x 16 x ...": what stands in brackets is prose, and the commas are no tuples.
    terms = "".join(part.split(")")[-1] for part in trained["flops_formula"].split("("))
    assert eval(terms.replace(",", "").replace("x", "*")) == trained["flops_per_token"]


def test_memory_is_that_of_the_state_and_more(trained):
    memory = trained["peak_memory"]
    assert memory["planned_bytes"] > 4 * 4 * trained["num_params"]  # parameters, two moments, accumulated gradient
    assert memory["process_bytes"] > memory["planned_bytes"]
    assert (memory["device_bytes"] is None) == (jax.default_backend() == "cpu")  # whose allocator keeps no count


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA sees none in a GPU's libraries")
def test_xla_counts_the_flops_of_the_formula(monkeypatch):
    monkeypatch.setattr(loss, "_FEWEST_TOKENS", 16)
    values = read_tiny_values()
    values.tokenizer.vocab_size = 512
    values.data.sequence_length = 64
    values.model.update(d_model=128, num_layers=1, num_heads=4, num_kv_heads=4, d_ff=384)
    config = with_synthetic_data(resolve(values))
    assert loss.num_chunks(config.train.batch_size, 64) == 8  # of which XLA counts one
    compiled = compile_step(config, config.train.batch_size)
    counted = train.count_cost(compiled, config)["flops"]
    by_formula = flops_per_token(config.model, 64) * 64 * config.train.batch_size
    # More than the formula: the blocks on the diagonal of attention, softmax, norms, AdamW.
    assert 1.0 < counted / by_formula < 1.15
    assert count_flash_attention_calls(compiled.as_text()) == 0  # a CPU has none


def test_rows_are_halved_until_a_step_is_cheap():
    config = tiny_config()
    per_row = flops_per_token(config.model, 16) * 16
    assert cheap_rows(config, 4 * per_row) == 4
    assert cheap_rows(config, 3 * per_row) == 2
    assert cheap_rows(config, 0) == 1


@pytest.mark.parametrize(
    ("flops", "num_bytes", "bound", "reached"), [(1e9, 1e7, "compute", 0.5), (1e8, 1e9, "memory", 5.0)]
)
def test_the_bound_is_what_takes_longer(flops, num_bytes, bound, reached):
    found = roofline.roofline(
        {"flops": flops, "bytes accessed": num_bytes}, formula_flops=1.0, seconds=0.02, rates=RATES, dtype="float32"
    )
    assert (found.bound, found.reached) == (bound, pytest.approx(reached))
    assert (found.compute_seconds, found.memory_seconds) == (flops / 1e11, num_bytes / 1e10)


def test_flops_that_xla_cannot_see_are_taken_from_the_formula():
    found = roofline.roofline(
        {"flops": 1e9, "bytes accessed": 1.0}, formula_flops=3e9, seconds=1.0, rates=RATES, dtype="bfloat16"
    )
    assert found.compute_seconds == 3e9 / 2e11


def test_the_device_is_measured(monkeypatch):
    monkeypatch.setattr(roofline, "_SECONDS", 0.0)
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 1e-3)
    for name, small in (("_COPY_BYTES", 2**20), ("_MATMUL_WIDTH", 64)):
        monkeypatch.setattr(roofline, name, small)
        monkeypatch.setattr(roofline, f"{name}_ON_CPU", small)
    rates = roofline.measure_rates()
    assert set(rates.matmul_flops_per_second) == {"bfloat16", "float32"}
    for rate in (rates.copy_bytes_per_second, *rates.matmul_flops_per_second.values()):
        assert 1e5 < rate.min <= rate.median <= rate.max < 1e14


def test_a_rate_is_of_calls_in_a_row_and_waits_for_the_device_once(monkeypatch):
    waits, wait = [], jax.block_until_ready
    monkeypatch.setattr(roofline, "_SECONDS", 0.0)
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 1.0)
    monkeypatch.setattr(timing, "take_samples", lambda measure, **_: [measure()])
    monkeypatch.setattr(roofline.time, "perf_counter", iter(float(second) for second in range(99)).__next__)
    monkeypatch.setattr(jax, "block_until_ready", lambda array: wait(waits.append(int(array)) or array))
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 5.0)
    found = roofline._time_chain(lambda array: array + 1, jax.numpy.int32(0))
    # Warmed up by one call, sized by one, and then five in a row, which by this clock take a second together.
    assert waits == [1, 2, 7]
    assert found.median == pytest.approx(1 / 5)


def test_flash_attention_is_found_in_compiled_text():
    call = 'custom-call(%a, %b), custom_call_target="{}", backend_config={{}}'
    forward, backward = call.format("__cudnn$fmhaSoftmax"), call.format("__cudnn$fmhaSoftmaxBackward")
    assert count_flash_attention_calls(f"{forward}\n{backward}\n{call.format('__cublas$gemm')}") == 2


def test_a_step_without_flash_attention_in_some_layer_is_no_result():
    config = dataclasses.replace(tiny_config(), model=dataclasses.replace(tiny_config().model, dtype="bfloat16"))
    client = SimpleNamespace(platform_version="cuda 12090")
    gpu = SimpleNamespace(platform="gpu", client=client, compute_capability="9.0")
    calls = 2 * config.model.num_layers
    text = 'custom_call_target="__cudnn$fmhaSoftmax"\n'
    assert find_flash_attention(config, gpu, text * calls) == {"expected": True, "calls_in_hlo": calls}
    with pytest.raises(RuntimeError, match=f"attention {calls - 1} times"):
        find_flash_attention(config, gpu, text * (calls - 1))
    cpu = SimpleNamespace(platform="cpu")
    assert find_flash_attention(config, cpu, text) == {"expected": False, "calls_in_hlo": None}


def test_writing_is_timed_by_batch_prompt_and_position():
    values = read_tiny_values()
    values.data.sequence_length = 64
    values.sample.max_new_tokens = 5
    values.model.num_layers = 1
    # So few tokens that the end token is drawn again and again, which must end nothing.
    config = with_data(resolve(values), vocab_size=61, num_blocks=40)
    decoded = measure_decode(config, (1, 2), 0.0)
    assert [batch["rows"] for batch in decoded["batches"]] == [1, 2]
    for batch in decoded["batches"]:
        assert batch["new_tokens"] == 5
        speed = batch["rows"] / batch["token_seconds"]["median"]
        assert batch["tokens_per_second"]["median"] == pytest.approx(speed)
        assert batch["compile_seconds"] > batch["token_seconds"]["median"]
    assert [first["prompt_length"] for first in decoded["first_token"]] == [31, 63]
    places = [(part["first"], part["last"]) for part in decoded["positions"]]
    assert places == [(first, first + 3) for first in range(12, 64, 4)]


def test_the_data_are_measured_on_the_configs_files(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_CACHE_BYTES", 10**6)
    stories = tmp_path / "stories.txt"
    stories.write_text("<|endoftext|>".join(f"Once there was a cat who had {n} mice." * 5 for n in range(800)))
    values = read_tiny_values()
    values.data.update(source="files", train_files=str(stories), valid_files=str(stories), max_stories=700)
    values.tokenizer.vocab_size = 280
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = data.measure_data(resolve(values), 1, lambda line: None)
    assert sorted(tmp_path.iterdir()) == before
    pipeline, bare = found["encode"]["pipeline"], found["encode"]["bare"]
    for count in ("num_stories", "num_bytes", "num_tokens"):
        assert pipeline[count] == bare[count] > 0
    assert pipeline["num_stories"] == 700
    assert str(stories) in found["stories"]
    assert found["ratio"] == pipeline["bytes_per_second"]["median"] / bare["bytes_per_second"]["median"]
    assert 0.9e6 < found["cache"]["num_bytes"] <= 1e6
    assert found["cache"]["batch_hot_seconds"]["median"] < 0.01
    assert format_section({"data": found})


def test_without_files_the_data_are_the_bundled_sample(tmp_path):
    values = read_tiny_values()
    values.data.update(source="hub", max_stories=5)
    source, origin = data._find_stories(resolve(values), tmp_path)
    assert (source.kind, source.files) == ("files", str(tmp_path / "stories.txt"))
    assert (tmp_path / "stories.txt").read_text().count("<|endoftext|>") == 4
    assert "sample" in origin


@pytest.mark.slow
def test_a_start_is_timed_by_phase(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "_DOCTOR", ("nodoctor",))
    monkeypatch.delenv("JAX_NUMPY_RANK_PROMOTION")
    values = read_tiny_values()
    values.data.update(source="hub", cache_dir=str(tmp_path / "cache"))
    values.tokenizer.update(vocab_size=300, max_samples=200)
    values.tokenizer.update(
        source="hub", hub_name="nobody/nothing", hub_revision="0" * 40
    )  # of which nothing may be fetched
    values.data.update(max_stories=300, sequence_length=64)  # tokens enough for the prompts
    found = start.measure_start(resolve(values), 2, 1, lambda line: None)
    for phases in found["nodoctor"].values():
        parts = [took["median"] for phase, took in phases.items() if phase != "total"]
        assert len(parts) == 3
        assert phases["total"]["median"] == pytest.approx(sum(parts))
    assert found["stories"] == "the bundled sample"
    assert not (tmp_path / "cache").exists()
    assert format_section({"start": found})


def test_a_start_that_fails_is_told_with_its_last_words(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        start._time_phases([f"--config={tmp_path / 'none.py'}"], {})


def test_growth_is_measured_against_flops(monkeypatch):
    monkeypatch.setattr(growth, "_SAMPLE_SECONDS", 1e-9)
    monkeypatch.setattr(growth, "_MIN_ROUNDS", 1)
    monkeypatch.setattr(growth, "_AXES", {"depth": (growth._grow_depth, (0.5, 1.0, 2.0))})
    found = growth.measure_growth(tiny_config(num_layers=1), 2, 1)
    points = found["axes"]["depth"]
    assert [point["shape"] for point in points] == [f"2 x 16, {n} layers, width 32, 48" for n in (1, 2)]
    assert points[1]["deviation"] == 0
    for point in points:
        per_flop = [one["seconds"]["median"] / one["flops"] for one in (point, points[1])]
        assert point["seconds"]["num_samples"] == 1
        assert point["deviation"] == pytest.approx(per_flop[0] / per_flop[1] - 1)
    assert format_section({"growth": found})


def test_every_axis_grows_what_it_names():
    config, shapes = tiny_config(), {}
    for axis, (grow, factors) in growth._AXES.items():
        shapes[axis] = [growth._describe(grow(config, factor)) for factor in factors]
    assert shapes == {
        "batch": [f"{rows} x 16, 2 layers, width 32, 48" for rows in (2, 4, 8, 16)],
        "context": [f"4 x {length}, 2 layers, width 32, 48" for length in (8, 16, 32, 64)],
        "depth": [f"4 x 16, {layers} layers, width 32, 48" for layers in (1, 2, 4, 8)],
        "width": [f"4 x 16, 2 layers, width {width}, {width * 3 // 2}" for width in (16, 32, 48, 64)],
    }


def raise_user_error() -> None:
    raise UserError(["one", "two"])


def run_out_of_memory() -> None:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")


def test_a_process_of_its_own_answers_with_its_variables_and_problems(monkeypatch):
    monkeypatch.setenv("REMOVED", "1")
    environment = {"ADDED": "2", "REMOVED": None}
    assert run_in_child(os.getenv, "ADDED", environment=environment) == "2"
    assert run_in_child(os.getenv, "REMOVED", environment=environment) is None
    assert (os.environ["REMOVED"], "ADDED" in os.environ) == ("1", False)
    with pytest.raises(UserError) as caught:
        run_in_child(raise_user_error)
    assert caught.value.problems == ("one", "two")
    with pytest.raises(UserError, match=r"run_out_of_memory: too little memory.*--config.train.batch_size"):
        run_in_child(run_out_of_memory)
    with pytest.raises(UserError, match="run_out_of_memory: too little memory"):
        run_in_child(call_as_script, run_out_of_memory)
    with pytest.raises(
        UserError, match="abort was ended by signal 6, as happens where memory runs out; try a smaller model"
    ):
        run_in_child(os.abort)
    with pytest.raises(RuntimeError, match="exit code 7"):
        run_in_child(os._exit, 7)


def test_resident_memory_is_known_here():
    peak = peak_resident_bytes()
    assert peak is not None
    assert 10**7 < peak < 10**11


def test_figures_are_json_with_a_section_for_each_mode(trained, monkeypatch):
    monkeypatch.setattr(benchmark_run, "_measure", lambda *arguments: trained)
    sections = [list(figures) for figures in run_benchmark(tiny_config(), "all", rounds=1, peer=False, log=print)]
    assert sections[-1] == ["machine", "config", *MODES]
    assert [len(section) for section in sections] == [2, 3, 4, 5, 6, 7]


def test_the_script_prints_a_table_and_writes_the_same_figures(tmp_path):
    flags = ["--config.data.sequence_length=16", "--config.model.num_layers=1", "--config.tokenizer.vocab_size=300"]
    path = tmp_path / "figures.json"
    result = run_script("benchmark", "decode", "--config=configs/quickstart.py", *flags, f"--json={path}")
    assert result.returncode == 0, result.stderr
    figures = json.loads(path.read_text())
    assert set(figures) == {"machine", "config", "decode"}
    machine = figures["machine"]
    assert machine["platform"] == "cpu"
    assert {"date", "command", "device", "cpu", "cpu_cores", "versions", "settings", "load_before"} <= set(machine)
    assert "scripts/benchmark.py decode" in machine["command"]
    assert machine["versions"]["jax"] == jax.__version__
    speed = figures["decode"]["batches"][0]["tokens_per_second"]["median"]
    assert f"{speed:,.0f} tokens/s" in result.stdout
    assert "measuring decode" in result.stderr
    for load, is_busy in ((0.5, False), (0.51, True)):
        table = format_section({"machine": machine | {"load_before": load}, "config": {}})
        assert ("other programs ran" in table) == is_busy


@pytest.mark.parametrize("mode", ["decode", "growth", "all"])
def test_a_context_too_short_to_write_into_is_refused(mode):
    config = tiny_config()
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=9))
    with pytest.raises(UserError, match=r"data.sequence_length=9: .* --config.data.sequence_length=10 or more"):
        next(run_benchmark(short, mode, rounds=1, peer=False, log=print))


def test_without_pytorch_peer_is_refused_with_what_to_install(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    line = error_line(run_script("benchmark", "train", "--peer", environment=environment))
    for words in ("--peer", "torch", "pip install"):
        assert words in line
