"""The scripts as a user starts them: whatever they can mend is an `error:` line and exit code 2, never a traceback."""

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data.hub_stand_in import HubDataset, hub_environment, hub_stand_in
from tinystories_jax import cli

ROOT = Path(__file__).resolve().parents[1]
STORIES = "\n<|endoftext|>\n".join(f"Once upon a time there was a cat who had {n} mice." for n in range(50))
TOP10K, QUICKSTART = "--config=configs/top10k.py", "--config=configs/quickstart.py"


def script_environment(**variables: str) -> dict[str, str]:
    """Returns the environment of a user's shell: CPU, nothing of what tests ask of JAX; caches as in conftest.py."""
    of_tests = ("JAX_NUMPY_RANK_PROMOTION", "JAX_DEFAULT_MATMUL_PRECISION")
    kept = {name: value for name, value in os.environ.items() if name not in of_tests}
    return {**kept, "JAX_PLATFORMS": "cpu", **variables}


def run_script(
    name: str, *arguments: str, timeout: float = 120, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs scripts/NAME.py in the root of the checkout."""
    return subprocess.run(
        [sys.executable, f"scripts/{name}.py", *arguments],
        cwd=ROOT,
        env=environment or script_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# What is given after it starts as from a terminal, also where the tests themselves run under nohup. Not by a function
# for the new process, since Python would fork for it, of which JAX warns.
OBEYING_HANGUPS = [
    *(sys.executable, "-c"),
    "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])",
]


def interrupt(process: subprocess.Popen[str], number: signal.Signals, *, at: str) -> tuple[int, str, str]:
    """Sends a signal as soon as a line that starts with `at` appears; returns exit code, stdout and stderr."""
    with process, contextlib.ExitStack() as on_failure:
        on_failure.callback(process.kill)
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith(at):
                process.send_signal(number)
                break
        stdout, stderr = process.communicate(timeout=120)
        on_failure.pop_all()
    return process.returncode, stdout, "".join(seen) + stderr


def error_lines(result: subprocess.CompletedProcess[str], *, after_log: bool = False) -> list[str]:
    """Returns the problems that a refusal names, each a line; `after_log` allows what was told before them."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors
    assert "Traceback" not in result.stderr
    assert lines[-len(errors) :] == errors
    assert after_log or lines == errors, result.stderr
    return errors


def error_line(result: subprocess.CompletedProcess[str], *, after_log: bool = False) -> str:
    (line,) = error_lines(result, after_log=after_log)
    return line


@pytest.fixture
def story_file(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text(STORIES)
    return path


def file_flags(tmp_path: Path, train: Path, valid: Path | None = None) -> list[str]:
    return [
        QUICKSTART,
        "--config.data.source=files",
        f"--config.data.train_files={train}",
        f"--config.data.valid_files={valid or train}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        "--config.data.sequence_length=32",
        "--config.tokenizer.vocab_size=280",
    ]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("MemoryError()", "too little memory"),
        ("RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.')", "too little memory"),
        ("OSError(12, 'Cannot allocate memory')", "too little memory"),
        ("OSError(5, 'Input/output error', 'train.txt')", "train.txt: Input/output error; mend that, or give"),
    ],
)
def test_what_the_machine_cannot_do_is_one_line(error, said):
    program = f"from tinystories_jax import cli\ndef main(): raise {error}\ncli.run(main)"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=script_environment(), capture_output=True, text=True, timeout=60
    )
    assert said in error_line(result)


def test_garbage_is_looked_for_again_once_all_is_imported():
    def import_in_vain() -> None:
        with cli.importing():
            assert not gc.isenabled()
            importlib.import_module("tinystories_jax.no_such_module")

    frozen = gc.get_freeze_count()
    try:
        with pytest.raises(ModuleNotFoundError):
            import_in_vain()
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("train", [], ["--config is missing"]),
        ("prepare", [], ["--config is missing"]),
        ("plan", [], ["--config is missing"]),
        ("plan", [TOP10K, "--mfu=40"], ["--mfu=40"]),
        ("sample", [], ["--checkpoint is missing"]),
        ("train_tokenizer", [], ["--output_dir is missing"]),
        ("train", ["--config=configs/none.py"], ["cannot be read", "configs/none.py"]),
        ("train", ["--config=configs/none.py", "--config.model.d_model=3"], ["cannot be read", "configs/none.py"]),
        ("train", ["--config=configs"], ["cannot be read", "directory", "'configs'"]),
        ("train", ["--config="], ["cannot be read", "empty"]),
        ("train", ["--config.model.d_model=3"], ["config.model.d_model"]),
        (
            "train",
            [TOP10K, "--config.model.d_modle=3"],
            ["--config.model.d_modle=3", 'Did you mean "d_model" instead of "d_modle"?'],
        ),
        (
            "prepare",
            [TOP10K, "--config.modle.d_model=3"],
            ["--config.modle.d_model=3", 'Did you mean "model" instead of "modle"?'],
        ),
        ("train", [TOP10K, "--config.zzz.qqq=3"], ["--config.zzz.qqq=3", "there is no 'zzz' in the config"]),
        ("train", [TOP10K, "--config.train.batch_size=abc"], ["--config.train.batch_size=abc"]),
        ("train", [TOP10K, "--config.train.batch_size=6.5"], ["--config.train.batch_size=6.5"]),
        ("train", [TOP10K, "--config.optim.learning_rate=None"], ["--config.optim.learning_rate=None"]),
        ("train", [TOP10K, "--config.model.d_model=None"], ["--config.model.d_model=None"]),
        ("train", [TOP10K, "--config.data.source=None"], ["data.source='None'", "hub, files, sample"]),
        ("train", [TOP10K, "--config.model.remat=maybe"], ["--config.model.remat=maybe"]),
        ("train", [TOP10K, "--config.model=3"], ["--config.model=3"]),
        ("train", [TOP10K, "--config.optim.learning_rate=nan"], ["optim.learning_rate=nan"]),
        ("train", [TOP10K, "extra"], ["'extra' is not a flag"]),
        ("sample", ["--checkpoint=x", "Once upon a time"], ["'Once upon a time' is not a flag"]),
        ("sample", ["--checkpoint=x", "--temprature=1"], ["temprature"]),
        ("sample", ["--checkpoint=x", "--temperature=warm"], ["--temperature=warm"]),
        ("sample", ["--checkpoint=x", "--num_samples=0"], ["--num_samples=0"]),
        ("sample", ["--checkpoint=x", "--max_new_tokens=-1"], ["--max_new_tokens=-1"]),
        ("sample", ["--checkpoint=x", "--top_k=9999999999"], ["--top_k=9999999999"]),
        ("sample", ["--checkpoint=x", "--seed=-1"], ["--seed=-1"]),
        ("train_tokenizer", ["--output_dir=x", "--vocab_size=256"], ["--vocab_size=256"]),
        ("train_tokenizer", ["--output_dir=x", "--source=disk"], ["--source=disk", "hub|files|sample"]),
        ("train_tokenizer", ["--output_dir=x", "--source=files"], ["--train_files is empty"]),
        ("report", [], ["RUN is missing"]),
        ("report", ["runs/a", "runs/b"], ["'runs/b'", "one RUN too many"]),
        ("report", ["runs/none"], ["runs/none/config.json does not exist"]),
        ("report", ["runs/none", "--open"], ["open"]),
        ("compare", ["runs/none"], ["RUN is missing", "needed 2", "given 1"]),
        ("benchmark", ["dance"], ["'dance' is no mode", "train, decode, data, start, growth"]),
        ("benchmark", ["train", "decode"], ["'decode'", "one MODE too many"]),
        ("benchmark", ["data", "--peer"], ["--peer", "'data'", "train, decode"]),
        ("benchmark", ["train", "--rounds=0"], ["--rounds=0"]),
        ("benchmark", ["train", "--json=runs/none/figures.json"], ["runs/none/figures.json"]),
    ],
)
def test_a_flag_that_cannot_be_used_is_refused_by_name(script, arguments, said):
    line = error_line(run_script(script, *arguments))
    for words in said:
        assert words in line


def test_all_problems_of_a_config_are_told_at_once_one_line_each():
    lines = error_lines(
        run_script("train", TOP10K, "--config.model.num_heads=6", "--config.optim.beta1=1", "--config.seed=-1")
    )
    assert len(lines) == 3
    for words in ("model.num_heads=6", "optim.beta1=1.0", "seed=-1"):
        assert words in "\n".join(lines)


@pytest.mark.parametrize(
    ("closed", "arguments", "code", "stdout", "stderr"),
    [
        (1, ["--help"], 0, "", ""),
        (2, ["runs/none"], 2, "", ""),
        (1, ["runs/none"], 2, "", "error: runs/none/config.json does not exist"),
    ],
)
def test_output_that_is_closed_is_done_without(closed, arguments, code, stdout, stderr):
    command = ["sh", "-c", f'exec "$@" {closed}>&-', "sh", sys.executable, "scripts/report.py", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=script_environment(), capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (code, stdout)
    assert result.stderr.startswith(stderr)
    assert bool(result.stderr) == bool(stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_place_for_standard_output_is_named():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "scripts/plan.py", TOP10K, "--nomeasure"]
        result = subprocess.run(
            command, cwd=ROOT, env=script_environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert result.returncode == 2
    assert result.stderr.endswith("standard output: No space left on device; make room, or give another place\n")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def get_config(: pass", "line 1: invalid syntax"),
        ("import no_such_module", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config():\n    return {}['seed']", "line 2: KeyError: seed"),
        ("def get_config():\n    return int('x')", "ValueError: invalid literal for int() with base 10: 'x'"),
        ("seed = 0", "no attribute 'get_config'"),
        ("def get_config():\n    return 3", "ConfigDict"),
    ],
)
def test_a_config_file_that_fails_is_refused_with_the_reason(tmp_path, source, said):
    path = tmp_path / "mine.py"
    path.write_text(source)
    assert said in error_line(run_script("train", f"--config={path}"))


def test_a_config_file_without_sections_is_refused_by_their_names(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config():\n    return {'seed': 0}\n")
    lines = "\n".join(error_lines(run_script("train", f"--config={path}")))
    assert all(section in lines for section in ("data", "tokenizer", "model", "train", "optim", "eval"))


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("train", ["--config", "--workdir", "--[no]doctor"]),
        ("doctor", ["--config", "--workdir", "--checkpoint", "--[no]json", "--[no]verbose"]),
        ("prepare", ["--config", "--[no]rebuild"]),
        ("plan", ["--config", "--[no]json", "--mfu", "--[no]measure"]),
        ("sample", ["--checkpoint", "--step", "--prompt", "--num_samples", "--max_new_tokens", "--temperature"]),
        ("sample", ["--top_k", "--top_p", "--repetition_penalty", "--seed", "--[no]stream"]),
        ("train_tokenizer", ["--vocab_size", "--output_dir", "--max_samples", "--source", "--train_files"]),
        ("train_tokenizer", ["--hub_name", "--hub_subset", "--hub_revision"]),
        ("report", []),
        ("compare", ["--output"]),
        ("calibrate", ["--train_files", "--valid_files", "--output"]),
        ("evaluate", ["--checkpoint", "--stories", "--step", "--num_stories", "--data", "--json", "--judge"]),
        ("evaluate", ["--temperature", "--seed"]),
        ("benchmark", ["--config", "--[no]peer", "--rounds", "--json"]),
    ],
)
def test_help_names_the_flags(script, names):
    result = run_script(script, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert all(f"  {name}:" in result.stdout for name in names)


def test_every_script_is_in_the_test_of_its_help():
    scripts = {"train", "prepare", "sample", "train_tokenizer", "doctor", "plan"}
    scripts |= {"evaluate", "report", "compare", "calibrate", "benchmark"}
    assert {path.stem for path in (ROOT / "scripts").glob("*.py")} == scripts


@pytest.mark.parametrize("script", ["report", "compare"])
def test_help_shows_the_arguments_that_are_no_flags(script):
    assert "RUN is a folder" in run_script(script, "--help").stdout


def test_files_that_do_not_exist_are_refused_by_name(tmp_path, story_file):
    for train, valid in ((tmp_path / "none.txt", story_file), (story_file, tmp_path / "none.txt")):
        result = run_script("prepare", *file_flags(tmp_path, train, valid))
        assert f"{tmp_path / 'none.txt'}: matches no file" in error_line(result, after_log=True)
    result = run_script(
        "train_tokenizer", "--source=files", f"--train_files={tmp_path / 'none.txt'}", f"--output_dir={tmp_path / 'x'}"
    )
    assert "none.txt: matches no file" in error_line(result)
    assert not (tmp_path / "x").exists()


def test_a_plan_is_json_and_prepares_nothing(tmp_path, story_file):
    result = run_script("plan", *file_flags(tmp_path, story_file), "--json", "--nomeasure")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["work"]["updates"] == 600
    assert list(tmp_path.iterdir()) == [story_file]


def test_a_tokenizer_that_is_none_is_refused_by_name(tmp_path, story_file):
    flags = file_flags(tmp_path, story_file)
    missing = run_script("prepare", *flags, f"--config.tokenizer.path={tmp_path / 'none.json'}")
    assert f"{tmp_path / 'none.json'} does not exist" in error_line(missing)
    text = run_script("prepare", *flags, f"--config.tokenizer.path={story_file}")
    assert f"{story_file} is not JSON" in error_line(text)


def test_a_cache_folder_below_a_file_is_refused(tmp_path, story_file):
    flags = [*file_flags(tmp_path, story_file), f"--config.data.cache_dir={story_file / 'cache'}"]
    line = error_line(run_script("prepare", *flags), after_log=True)
    assert str(story_file) in line
    assert "--config.data.cache_dir" in line


def test_a_hub_that_cannot_be_reached_is_told_soon_with_the_other_sources(tmp_path):
    environment = script_environment(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "home"))
    flags = [TOP10K, f"--config.data.cache_dir={tmp_path / 'cache'}", f"--workdir={tmp_path / 'run'}"]
    began = time.monotonic()
    result = run_script("train", *flags, environment=environment)
    assert time.monotonic() - began < 35
    line = error_line(result, after_log=True)
    for words in ("http://127.0.0.1:9", "--config.data.source=files", "--config.data.source=sample"):
        assert words in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_the_data_is_prepared_ends_the_script_at_once(tmp_path, number, code):
    stories = HubDataset({"default": {"train": ["Once."], "validation": ["Once."]}})
    with hub_stand_in({"roneneldan/TinyStories": stories}, fault="silence") as endpoint:
        process = subprocess.Popen(
            [sys.executable, "scripts/prepare.py", TOP10K, f"--config.data.cache_dir={tmp_path / 'cache'}"],
            cwd=ROOT,
            env=hub_environment(endpoint, tmp_path / "home"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert interrupt(process, number, at="tokenizer: training")[0] == code
    # Nothing half-built is left.
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


SIGNALLED = """
import signal, sys, time
from tinystories_jax import cli

where, number = sys.argv.pop(), signal.Signals(int(sys.argv.pop()))

class Destroyed:
    def __del__(self):
        signal.raise_signal(number)
        for _ in range(100):  # handlers are called at the end of a turn
            pass

def main():
    print("before")
    match where:
        case "our code":
            signal.raise_signal(number)
        case "while an object is destroyed":
            Destroyed()
        case "in a callback of JAX":
            import jax.monitoring
            jax.monitoring.register_event_listener(lambda event, **more: signal.raise_signal(number))
            try:
                jax.monitoring.record_event("one")
            except BaseException:  # as native code does
                pass
        case "while a package is imported":
            sys.path.append(str(int(number)))
            try:
                import signalling
            except BaseException:
                pass
        case "in native code" | "while a thread of ours works":
            import hashlib, os, threading
            from tinystories_jax.background import in_background
            threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
            work = hashlib.pbkdf2_hmac, "sha256", b"", b"", 2**31 - 1  # hours
            in_background("test", *work).result() if "thread" in where else work[0](*work[1:])
        case "when all is done":
            import atexit
            atexit.register(signal.raise_signal, number)
            return 7
    time.sleep(30)
    print("went on")

cli.run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(
    "where",
    [
        "our code",
        "while an object is destroyed",
        "in a callback of JAX",
        "while a package is imported",
        "in native code",
        "while a thread of ours works",
        "when all is done",
    ],
)
def test_a_signal_ends_a_script_wherever_it_falls(tmp_path, where, number):
    (tmp_path / "signalling.py").write_text("import signal, sys\nsignal.raise_signal(int(sys.path[-1]))\n")
    environment = script_environment(PYTHONPATH=f"{ROOT}:{tmp_path}")
    result = subprocess.run(
        [*OBEYING_HANGUPS, sys.executable, "-c", SIGNALLED, str(int(number)), where],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=25,
    )
    code = 7 if where == "when all is done" else 128 + number
    assert (result.returncode, result.stdout, result.stderr) == (code, "before\n", "")


def test_under_nohup_a_hangup_ends_nothing(tmp_path):
    lines = [
        "import signal",
        "from tinystories_jax import cli",
        "from tinystories_jax.signals import StopSignals",
        "def main():",
        "    signal.raise_signal(signal.SIGHUP)",
        "    with StopSignals() as stop:",
        "        signal.raise_signal(signal.SIGHUP)",
        "    print('went on,', stop.signal)",
        "cli.run(main)",
    ]
    command = ["nohup", sys.executable, "-c", "\n".join(lines)]
    result = subprocess.run(command, cwd=ROOT, env=script_environment(), capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "went on, None\n"), result.stderr


@pytest.mark.parametrize("where", ["a file", "below a file"])
def test_a_workdir_that_cannot_be_one_is_refused(tmp_path, story_file, where):
    workdir = story_file if where == "a file" else story_file / "run"
    result = run_script("train", *file_flags(tmp_path, story_file), f"--workdir={workdir}")
    assert str(workdir) in error_line(result, after_log=True)
    assert story_file.read_text() == STORIES


@pytest.mark.parametrize("kind", ["missing", "a file", "an empty folder"])
def test_sampling_from_what_is_no_run_is_refused(tmp_path, story_file, kind):
    folder = {"missing": tmp_path / "none", "a file": story_file, "an empty folder": tmp_path}[kind]
    assert f"{folder}: no run with checkpoints" in error_line(run_script("sample", f"--checkpoint={folder}"))


def test_sampling_flags_out_of_range_are_refused_all_at_once(tmp_path):
    flags = ["--top_p=0", "--temperature=-1", "--top_k=-1", "--repetition_penalty=0"]
    lines = "\n".join(error_lines(run_script("sample", f"--checkpoint={tmp_path}", *flags)))
    for words in ("top_p=0", "temperature=-1", "top_k=-1", "repetition_penalty=0"):
        assert words in lines
    for flag in ("--temperature=nan", "--temperature=inf", "--top_p=nan", "--top_p=1.1"):
        assert flag.strip("-") in error_line(run_script("sample", f"--checkpoint={tmp_path}", flag))
