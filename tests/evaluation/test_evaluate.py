"""The score of a model or of any stories: what is measured, what decides, what is written, and the real script."""

import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.analysis.make_run import make_run
from tests.evaluation.judge_stand_in import KEY, Reply, judge_stand_in
from tests.test_cli import error_line, error_lines, run_script, script_environment
from tests.test_end_to_end import Place, make_stories, write_txt
from tinystories_jax.analysis.report import write_report
from tinystories_jax.analysis.run_files import read_run
from tinystories_jax.errors import UserError
from tinystories_jax.evaluation import checker
from tinystories_jax.evaluation.bootstrap import Interval
from tinystories_jax.evaluation.calibration import spoil
from tinystories_jax.evaluation.copies import CopyScores
from tinystories_jax.evaluation.evaluate import evaluate_texts, read_prompts, read_texts
from tinystories_jax.evaluation.grammar import real_scores, score_stories
from tinystories_jax.evaluation.judge import JudgeScores
from tinystories_jax.evaluation.results import (
    Evaluation,
    format_figure,
    format_interval,
    format_markdown,
    format_text,
    write_evaluation,
    write_json,
)
from tinystories_jax.evaluation.scorecard import Measured, list_criteria, list_figures, list_scores
from tinystories_jax.evaluation.validation import ArticleScores, ValidationScores
from tinystories_jax.training.meta import digest_of_meta

CLEAN = "Once upon a time, there was a little girl named Lily. She went to the park with her mom. They were happy."
FAULTY = "Once upon time there was girl named Lily. She went to park with her mom. They was happy."
ARTICLES = ArticleScores(loss=1.2, probability=0.5, recall=0.6, num_targets=100)
NOBODY = ArticleScores(math.nan, math.nan, math.nan, 0)
LOSS = ValidationScores(1.9, 0.7, 1000, ARTICLES, {"a": ARTICLES, "an": NOBODY, "the": ARTICLES})
COPIES = CopyScores(200, 0.01, Interval(0.0, 0.02), 17, 44)
JUDGE = JudgeScores("m", 3, 1, {"grammar": 8, "creativity": 4, "consistency": 5}, {}, {"6-7": 3}, None)


def be_silent(line: str) -> None:
    pass


def measure(**text: Any) -> Measured:
    """Returns what real stories would score, but for the given figures of their text."""
    return Measured(dataclasses.replace(real_scores(), **text), LOSS, "x.txt", COPIES, COPIES)


def evaluation_of(measured: Measured) -> Evaluation:
    figures = {"checkpoint_update": 20, **list_figures(measured)}
    scores, criteria = list_scores(measured), list_criteria(measured)
    story = {"prompt": "# A", "text": "# A story\n\nof two <b>lines</b>.", "finished": True}
    return Evaluation("runs/a", figures, scores, criteria, ("a note",), (story,))


def verdicts(measured: Measured) -> list[str]:
    return [criterion.verdict for criterion in list_criteria(measured)]


def verdicts_in(text: str) -> list[str]:
    """Returns the verdicts that a terminal shows; a criterion's further lines are indented."""
    return [line.split()[0] for line in text.split("\n\n")[-1].splitlines() if not line.startswith(" ")]


def test_real_stories_and_a_low_loss_pass():
    assert verdicts(measure()) == ["PASS", "PASS", "PASS"]


@pytest.mark.parametrize(("loss", "verdict"), [(1.9999, "PASS"), (2.0, "FAIL"), (math.nan, "FAIL")])
def test_the_loss_must_be_below_two(loss, verdict):
    measured = dataclasses.replace(measure(), loss=dataclasses.replace(LOSS, loss=loss))
    assert verdicts(measured)[0] == verdict


def test_articles_must_reach_the_interval_of_real_stories_whatever_their_own():
    low, high = real_scores().articles_interval
    shares = {low - 1e-6: "FAIL", low: "PASS", high + 0.001: "PASS", math.nan: "unknown"}
    for share, verdict in shares.items():
        assert verdicts(measure(articles=share, articles_interval=Interval(0.5, 1.0)))[1] == verdict


def test_articles_everywhere_do_not_pass():
    real = real_scores().articles_actual_to_expected
    limits = {1.0999: "PASS", 1.1001: "FAIL", 1 / 1.0999: "PASS", 1 / 1.1001: "FAIL", math.nan: "unknown"}
    ratios = {limit * real: verdict for limit, verdict in limits.items()}
    for ratio, verdict in ratios.items():
        assert verdicts(measure(articles=1.0, articles_actual_to_expected=ratio))[1] == verdict


def test_articles_before_names_do_not_pass(tinystories_data):
    names = r"\b(Lily|Tim|Timmy|Tom|Sue|Ben|Max|Sam|Mia|Anna|Lucy|Jack|Sara|Mom|Dad)\b"
    real = read_texts(str(tinystories_data / "valid.txt"), 60)
    spoiled = [re.sub(names, r"the \1", text) for text in real]
    verdict = {}
    for name, texts in (("real", real), ("spoiled", spoiled)):
        text = score_stories(texts, check_grammar=False)
        assert text.articles >= real_scores().articles_interval.low
        verdict[name] = verdicts(dataclasses.replace(measure(), text=text))[1]
    assert verdict == {"real": "PASS", "spoiled": "FAIL"}


def test_grammar_must_reach_eight():
    assert [verdicts(measure(grammar=grammar))[2] for grammar in (7.99, 8.0, math.nan)] == ["FAIL", "PASS", "unknown"]


def test_one_faultless_sentence_over_and_over_does_not_pass():
    assert [verdicts(measure(repetition=share))[2] for share in (0.05, 0.0501)] == ["PASS", "FAIL"]
    text = score_stories(["Tom was happy. " * 80] * 60)
    assert text.grammar >= 8
    assert verdicts(dataclasses.replace(measure(), text=text))[1:] == ["unknown", "FAIL"]


def test_one_faultless_story_over_and_over_does_not_pass(tinystories_data):
    (story,) = read_texts(str(tinystories_data / "valid.txt"), 1)
    text = score_stories([story] * 200, check_grammar=False)
    assert text.repetition <= 0.05
    measured = dataclasses.replace(measure(), text=dataclasses.replace(text, grammar=10.0))
    assert verdicts(measured)[2] == "FAIL"
    assert (
        verdicts(dataclasses.replace(measured, text=dataclasses.replace(measured.text, distinct_1=0.05)))[2] == "PASS"
    )


def test_a_loss_by_another_vocabulary_decides_nothing():
    loss = measure().loss
    assert loss is not None
    # As many bits for a byte, in tokens of 2.4 bytes.
    short = dataclasses.replace(measure(), loss=dataclasses.replace(loss, loss=loss.loss * 2.4 / 4.1))
    assert verdicts(short)[0] == "unknown"
    assert (
        "2.29 bytes a token, where the recipe's vocabulary has 4.1: only bits per byte"
        in list_criteria(short)[0].figure
    )


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"num_stories": 49}, "too few stories: 49, a verdict takes 50"),
        ({"words_per_story": 49.0}, "too short stories: 49 words, a verdict takes 50"),
        ({"words_per_story": math.nan}, "too short stories: nan words, a verdict takes 50"),
    ],
)
def test_too_little_text_decides_nothing(figures, said):
    assert verdicts(measure(**figures)) == ["PASS", "unknown", "unknown"]
    assert all(said in criterion.figure for criterion in list_criteria(measure(**figures))[1:])


def test_what_the_prompts_alone_score_decides_nothing():
    text = score_stories(list(itertools.islice(itertools.cycle(read_prompts()), 200)), finished=[True] * 200)
    assert text.grammar >= 8
    assert verdicts(dataclasses.replace(measure(), text=text))[1:] == ["unknown", "unknown"]


def test_another_temperature_stands_beside_the_verdict():
    assert not any("temperature" in item.figure for item in list_criteria(measure()))
    tame = dataclasses.replace(measure(), temperature=0.8)
    said = "at temperature 0.8, where 1 has the scale of real stories"
    assert [said in item.figure for item in list_criteria(tame)] == [False, True, True]


def test_what_decides_stands_beside_the_verdict():
    loss, articles, grammar = list_criteria(measure(articles=0.9, articles_interval=Interval(0.85, 0.95)))
    assert loss.figure == "1.900 nats per token, on x.txt"
    ratio = format_figure(real_scores().articles_actual_to_expected)
    assert articles.figure == f"0.9000 (0.8500 to 0.9500); actual to expected {ratio}"
    assert grammar.figure.startswith("9.9")
    unknown = dataclasses.replace(measure(grammar=math.nan), loss=None, loss_on="no cache; give --data FILE")
    assert [item.figure for item in list_criteria(unknown)][::2] == [
        "no cache; give --data FILE",
        f"not measured; 0.01020 repeated, {format_figure(real_scores().distinct_1)} distinct",
    ]


def test_each_figure_stands_beside_that_of_real_stories():
    rows = {score.name: score for score in list_scores(measure(repetition=0.5, repetition_interval=Interval(0.4, 0.6)))}
    repetition = rows["repeated 4-grams, within a story"]
    assert (repetition.value, repetition.interval) == (0.5, (0.4, 0.6))
    assert (repetition.real, repetition.real_interval) == (real_scores().repetition, real_scores().repetition_interval)
    assert rows["loss"].value == 1.9
    assert rows["perplexity"].value == pytest.approx(math.exp(1.9))
    assert rows['recall at "the"'].value == 0.6
    assert rows["longest copied run of all"].value == 44
    assert not any("judged" in name for name in rows)
    judged = list_scores(dataclasses.replace(measure(), judge=dataclasses.replace(JUDGE, intervals=JUDGE.marks)))
    assert [score.value for score in judged if score.name.endswith("judged by m")] == [8, 4, 5]


def test_figures_are_short_and_intervals_are_plain():
    assert [format_figure(value) for value in (1.0, 0.00341, 12345.6, 0, 31, None, math.nan)] == [
        *("1.000", "0.003410", "12,346", "0", "31", "–", "–")
    ]
    assert [format_interval(value) for value in ((0.5, 1.0), None, (math.nan, math.nan))] == [
        *("0.5000 to 1.000", "", "")
    ]


def test_json_holds_no_nan_and_the_promised_names():
    values = evaluation_of(measure(grammar=math.nan, grammar_interval=Interval(math.nan, math.nan))).to_json()
    text = json.dumps(values, allow_nan=False)
    assert "NaN" not in text
    read = json.loads(text)
    assert (read["grammar"], read["grammar_interval"]) == (None, None)
    assert (read["articles"], read["articles_interval"]) == (real_scores().articles, [*real_scores().articles_interval])
    assert (read["loss"], read["bits_per_byte"], read["checkpoint_update"]) == (1.9, 0.7, 20)
    assert read["article_targets"]["an"] == {"loss": None, "probability": None, "recall": None, "num_targets": 0}
    assert read["copies"]["near_copies_interval"] == [0.0, 0.02]
    assert read["judge"] is None


def test_text_and_markdown_say_the_same():
    evaluation = evaluation_of(measure())
    text, page = format_text(evaluation), format_markdown(evaluation)
    for words in ("runs/a", "a note", "articles where one is needed", "PASS", "1.900 nats per token"):
        assert words in text
        assert words in page
    assert verdicts_in(text) == ["PASS", "PASS", "PASS"]
    assert all(len(line) <= 100 for line in text.split("a note")[1].splitlines())
    # A story is shown as it is, and is neither heading nor HTML.
    assert "    # A story\n    \n    of two <b>lines</b>.\n" in page
    assert "A story" not in text


def test_the_report_shows_what_was_written(tmp_path):
    run = make_run(tmp_path / "run")
    measured = dataclasses.replace(measure(), loss=None, loss_on="no validation cache")
    evaluation = evaluation_of(measured)
    write_evaluation(evaluation, run)
    stored = read_run(run).evaluation
    assert stored is not None
    assert stored.criteria == evaluation.criteria
    assert [(score.name, score.value, score.real) for score in stored.scores] == [
        (score.name, score.value, score.real) for score in evaluation.scores
    ]
    assert (stored.update, stored.num_stories) == (20, 250)
    assert stored.grammar.interval == evaluation.figures["grammar_interval"]
    page = write_report(run).read_text()
    for words in ("unknown", "no validation cache", "articles where one is needed", "PASS"):
        assert words in page
    files = {"evaluation.json", "evaluation.md", "evaluation_stories.jsonl"}
    assert {path.name for path in run.glob("*evaluation*")} == files


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path):
    evaluation, target, link, pipe = evaluation_of(measure()), tmp_path / "t", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    write_json(evaluation, link)
    assert link.is_symlink()
    assert json.loads(target.read_text())["loss"] == 1.9
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    write_json(evaluation, pipe)
    reader.join()
    assert json.loads(received[0])["loss"] == 1.9
    assert pipe.is_fifo()


def test_the_prompts_are_44_and_leave_room_to_write():
    prompts = read_prompts()
    assert len(prompts) == len(set(prompts)) == 44
    assert all(prompt == prompt.strip() for prompt in prompts)
    assert all(prompt.isascii() for prompt in prompts)
    # A quarter of the shortest context that a config here has, even if each token were two letters.
    assert max(map(len, prompts)) <= 60
    ends = [prompt.split()[-1] for prompt in prompts]
    assert {"a", "an"} & set(ends)
    assert sum('"' in prompt for prompt in prompts) >= 4


def test_texts_are_read_as_they_are_up_to_a_limit(tmp_path):
    texts = ["Once. ", "Once.", "cafÃ© “x”", "Twice.<|endoftext|>Thrice.", "\n"]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(texts) + "\n<|endoftext|>")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"story": text}) for text in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "c.parquet")
    for name in ("a.txt", "b.jsonl", "c.parquet"):
        read = read_texts(str(tmp_path / name), 100)
        assert read == ["Once.", "Once.", "cafÃ© “x”", "Twice.", "Thrice."]
        assert read_texts(str(tmp_path / name), 2) == ["Once.", "Once."]
    (tmp_path / "blank.txt").write_text(" \n<|endoftext|>\n ")
    with pytest.raises(UserError, match="holds no story"):
        read_texts(str(tmp_path / "blank.txt"), 10)


def test_texts_are_scored_without_a_model():
    long = [" ".join([text] * 3) for text in [CLEAN] * 45 + [FAULTY] * 15]
    evaluation = evaluate_texts(long, title="sixty", log=be_silent)
    values = evaluation.to_json()
    assert values["num_stories"] == 60
    assert 0 < values["grammar"] < 10
    assert values["loss"] is values["copies"] is values["finished"] is None
    assert [criterion.verdict for criterion in evaluation.criteria] == ["unknown", "FAIL", "FAIL"]
    assert "stories alone have none; give --checkpoint" in evaluation.criteria[0].figure
    assert any("fewer than 20,000 words" in note for note in evaluation.notes)
    assert any("58 of the 60 stories are another's double" in note for note in evaluation.notes)
    other = evaluate_texts(long[44:46], title="two", log=be_silent)
    assert not any("double" in note for note in other.notes)
    assert evaluation == evaluate_texts(long, title="sixty", log=be_silent)


def test_without_the_checker_everything_but_grammar_is_scored(monkeypatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    checker.load_checker.cache_clear()
    evaluation = evaluate_texts([CLEAN] * 3, title="three", log=be_silent)
    assert [criterion.verdict for criterion in evaluation.criteria] == ["unknown", "unknown", "unknown"]
    (note,) = [note for note in evaluation.notes if "pip install" in note]
    assert "lingotweaker==0.2.8" in note
    values = evaluation.to_json()
    assert (values["grammar"], values["grammar_interval"], values["articles"]) == (None, None, 1.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    train = write_txt(folder / "train.txt", make_stories(60, seed=0))
    valid = write_txt(folder / "valid.txt", make_stories(10, seed=1))
    return Place(folder, str(train), str(valid), folder / "cache")


@pytest.fixture(scope="module")
def trained(place: Place) -> Path:
    """Returns a run of two updates, with room for the prompts in its context."""
    flags = ["--config.data.sequence_length=64", "--config.train.max_updates=2", "--config.model.dropout=0"]
    flags += ["--config.sample.prompts=('Tom',)", "--config.eval.max_batches=1"]
    result = place.train(place.folder / "run", *flags)
    assert result.returncode == 0, result.stderr
    return place.folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def change_checkpoints(run: Path, **fields: Any) -> None:
    """Replaces fields of `data` in the config that stands in each checkpoint, under a checksum that is right."""
    for part in (run / "checkpoints").glob("*/meta/metadata"):
        values = json.loads(part.read_text())
        del values["xxh3_128"]
        values["config"]["data"] |= fields
        part.write_text(json.dumps({**values, "xxh3_128": digest_of_meta(values)}))


def test_a_run_is_evaluated_from_its_own_files(run, place, tmp_path):
    flags = [f"--checkpoint={run}", "--num_stories=46", f"--json={tmp_path / 'out.json'}"]
    result = run_script("evaluate", *flags, environment=place.environment)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"{run}, checkpoint of update 2"
    assert verdicts_in(result.stdout) == ["unknown", "unknown", "unknown"]
    assert "only bits per byte compare" in " ".join(result.stdout.split())  # its vocabulary is small
    values = json.loads((run / "evaluation.json").read_text())
    assert json.loads((tmp_path / "out.json").read_text()) == values
    assert (values["num_stories"], values["checkpoint_update"], values["temperature"]) == (46, 2, 1.0)
    assert values["loss_on"] == "the run's validation split (training: eval.max_batches=1)"
    # Over the whole split, whatever the run's own evaluations read.
    (manifest,) = [json.loads(path.read_text()) for path in place.cache.glob("tokens/validation-*/manifest.json")]
    assert values["num_loss_tokens"] == manifest["num_tokens"]
    assert values["bits_per_byte"] == pytest.approx(
        values["loss"] * manifest["num_tokens"] / (math.log(2) * manifest["num_bytes"])
    )
    assert sum(values["article_targets"][article]["num_targets"] for article in ("a", "an", "the")) > 0
    # Two updates teach nothing to copy, but these stories were made of few words.
    assert values["copies"]["longest"] == 0
    assert values["real_copies"]["longest"] >= 16
    stories = [json.loads(line) for line in (run / "evaluation_stories.jsonl").read_text().splitlines()]
    assert [story["prompt"] for story in stories] == [*read_prompts(), *read_prompts()[:2]]
    assert all(story["text"].startswith(story["prompt"]) for story in stories)
    assert sum(story["finished"] for story in stories) == pytest.approx(values["finished"] * 46)
    page = (run / "evaluation.md").read_text()
    assert "## Stories" in page
    assert "Once upon a time there was" in page
    assert "articles where one is needed" in write_report(run).read_text()


def test_greedily_a_prompt_has_one_story(run, place):
    result = run_script("evaluate", f"--checkpoint={run}", "--temperature=0", environment=place.environment)
    assert result.returncode == 0, result.stderr
    assert json.loads((run / "evaluation.json").read_text())["num_stories"] == 44
    stories = [json.loads(line) for line in (run / "evaluation_stories.jsonl").read_text().splitlines()]
    assert [story["prompt"] for story in stories] == read_prompts()
    assert "one a prompt at most" in result.stdout


def test_the_loss_is_measured_on_any_file_and_again_the_same(run, place, tmp_path):
    other = write_txt(tmp_path / "other.txt", ["He went to the park.", "A café."])
    flags = [f"--checkpoint={run}", "--num_stories=46", f"--data={other}"]
    before = {path for path in place.folder.rglob("*") if "compiled" not in path.parts}
    found = []
    for is_second in (False, True):
        result = run_script("evaluate", *flags, environment=place.environment)
        assert result.returncode == 0, result.stderr
        assert ("in place of an earlier score" in result.stderr) == is_second
        found.append((run / "evaluation.json").read_bytes())
        assert f"nats per token, on {other}" in " ".join(result.stdout.split())
    assert found[0] == found[1]
    values = json.loads(found[0])
    assert values["bits_per_byte"] == pytest.approx(
        values["loss"] * values["num_loss_tokens"] / (math.log(2) * len("He went to the park.A café.".encode()))
    )
    assert {name: values["article_targets"][name]["num_targets"] for name in ("a", "the")} == {"a": 1, "the": 1}
    assert {path for path in place.folder.rglob("*") if "compiled" not in path.parts} == before


def test_a_run_whose_caches_are_gone_is_scored_by_its_stories_and_judged(run, place, tmp_path):
    change_checkpoints(run, cache_dir=str(tmp_path / "gone"))
    with judge_stand_in() as server:
        variables = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": KEY}
        flags = [f"--checkpoint={run}", "--num_stories=3", "--judge=openai:some/model"]
        outputs = [run_script("evaluate", *flags, environment={**place.environment, **variables}) for _ in range(2)]
        assert len(server.requests) == 3
    for result in outputs:
        assert result.returncode == 0, result.stderr
        told = " ".join(result.stdout.split())
        assert "unknown validation loss < 2.0: its validation cache is not in /" in told
        assert "give --data FILE" in result.stdout
        assert "copies: not looked for, no training cache in" in result.stdout
        assert "judge: 3 stories judged, 0 not; ages guessed: 6-7: 3" in result.stdout
        assert KEY not in result.stdout + result.stderr
    values = json.loads((run / "evaluation.json").read_text())
    assert (values["loss"], values["copies"], values["judge"]["marks"]["grammar"]) == (None, None, 7)
    assert len((run / "judge.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("status", [401, 503])
def test_what_was_measured_is_written_when_the_judge_refuses_or_is_away(status, tmp_path):
    stories, output = write_txt(tmp_path / "stories.txt", ["Tom had a cat."]), tmp_path / "out.json"
    with judge_stand_in(lambda number, body: Reply(status=status, headers={"Retry-After": "0"})) as server:
        environment = script_environment(OPENAI_BASE_URL=server.url, OPENAI_API_KEY=KEY)
        flags = [f"--stories={stories}", f"--json={output}", "--judge=openai:m"]
        result = run_script("evaluate", *flags, environment=environment)
    values = json.loads(output.read_text())
    assert values["num_stories"] == 1
    assert values["notes"][-1] == f"judge: stopped, {values['judge']['problem']}"
    assert values["notes"][-1] in result.stdout
    errors = [line for line in result.stderr.splitlines() if "rror" in line]
    assert errors == ([f"error: {values['judge']['problem']}"] if status == 401 else [])
    assert result.returncode == (2 if status == 401 else 0)


@pytest.mark.slow
def test_real_stories_score_high_and_without_articles_low(tinystories_data, tmp_path):
    valid = tinystories_data / "valid.txt"
    dropped = [spoil(text, "articles dropped", 1.0, seed=0) for text in read_texts(str(valid), 60)]
    files = {"real": valid, "dropped": write_txt(tmp_path / "dropped.txt", dropped)}
    found = {}
    for name, file in files.items():
        output = tmp_path / f"{name}.json"
        result = run_script("evaluate", f"--stories={file}", "--num_stories=60", f"--json={output}")
        assert result.returncode == 0, result.stderr
        found[name] = json.loads(output.read_text()), verdicts_in(result.stdout)
    real, verdict = found["real"]
    assert real["grammar"] >= 9
    assert verdict == ["unknown", "PASS", "PASS"]
    assert real["title"].endswith("valid.txt, the first 60 stories")
    spoiled, verdict = found["dropped"]
    assert spoiled["articles"] < 0.02
    assert spoiled["grammar"] < 3
    assert verdict == ["unknown", "FAIL", "FAIL"]
    # Nothing but what was asked for.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dropped.json", "dropped.txt", "real.json"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "either --checkpoint=RUN or --stories=FILE"),
        (["--checkpoint=x", "--stories=y"], "either --checkpoint=RUN or --stories=FILE"),
        (["--stories=x.txt", "--data=y.txt"], "--data=y.txt: needs a model"),
        (["--stories=x.txt", "--step=latest"], "--step=latest: needs a model"),
        (["--stories=x.txt", "--temperature=0.8"], "--temperature=0.8: needs a model"),
        (["--stories=x.txt", "--seed=0"], "--seed=0: needs a model"),
        (["--stories=none.txt"], "none.txt: matches no file"),
        (["--checkpoint=runs/none"], "runs/none: no run with checkpoints"),
        (["--checkpoint=x", "--num_stories=0"], "--num_stories=0"),
        (["--checkpoint=x", "--judge=openai:m"], "OPENAI_BASE_URL and OPENAI_API_KEY not set"),
        (["--checkpoint=x", "--judge=m"], "must be openai:MODEL"),
        (["--stories=README.md", "--json=none/x.json"], "--json=none/x.json: the folder none does not exist"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_in_one_line(flags, said, monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert said in error_line(run_script("evaluate", *flags))


def test_the_figures_replace_no_file_of_the_run(run):
    before = (run / "config.json").read_bytes()
    result = run_script("evaluate", f"--checkpoint={run}", f"--json={run / 'config.json'}")
    assert "is a file of the run" in error_line(result)
    assert (run / "config.json").read_bytes() == before


def test_prompts_that_a_short_context_cannot_hold_are_refused(run, place):
    change_checkpoints(run, sequence_length=24)
    lines = error_lines(run_script("evaluate", f"--checkpoint={run}", environment=place.environment))
    assert all("context of 24" in line for line in lines)
