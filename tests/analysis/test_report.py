"""The report says what the files of a run say, at any moment of it, and never more."""

import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.analysis.make_run import NUM_UPDATES, PROMPTS, make_run, write_evaluation
from tinystories_jax.analysis.report import write_report
from tinystories_jax.analysis.run_files import read_run
from tinystories_jax.errors import UserError
from tinystories_jax.training.environment import recorded_start

_VOID = {"meta", "link", "br", "use"}


class _Structure(HTMLParser):
    """Collects the text, the tags and the addresses of a page; fails where tags are not nested."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.pieces: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())


def read_report(run: Path) -> _Structure:
    return _Structure(write_report(run).read_text(encoding="utf-8"))


def cut_off(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-num_bytes])


def test_a_finished_run_is_told_whole(tmp_path):
    run = make_run(tmp_path / "my_run", loss=1.875)
    page = read_report(run)
    for words in (
        *("my_run", f"Finished: {NUM_UPDATES} updates", "1.875", "bits per byte", "70.0%", "1.0 min"),
        *("Loss over updates", "Loss over wall time", "Learning rate", "Gradient norm", "Tokens per second"),
        *("Emergence", "grammar of 10", "Articles", "Samples", "there was", "Configuration", "grad_accum_steps"),
        f"python scripts/evaluate.py --checkpoint {run}",
    ):
        assert words in page.text, words
    assert page.tags.count("svg") == 7
    assert page.text.count("best") >= 1
    for prompt in PROMPTS:
        assert prompt in page.text


def test_the_page_needs_nothing_but_itself(tmp_path):
    run = make_run(tmp_path / "run")
    page = read_report(run)
    assert "script" not in page.tags
    assert all(address.startswith("#") or address == "data:," for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    source = (run / "report.html").read_text()
    assert not re.search(r"@import|url\((?!#)", source)
    assert "default-src 'none'" in source


def test_the_same_files_give_the_same_bytes(tmp_path):
    run = make_run(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert sorted(path.name for path in run.iterdir()) == [
        *("config.json", "metrics.jsonl", "report.html", "samples.jsonl", "tokenizer"),
    ]


def test_stories_and_names_are_shown_as_text_whatever_they_hold(tmp_path):
    story = "Once upon a time <script>alert('a')</script> & <b>the</b> \"cat\" \n</div></table>"
    run = make_run(tmp_path / "<i>run & co", text=story)
    half_a_character = {"update": 20, "prompt": "", "text": "\ud83d|"}
    with (run / "samples.jsonl").open("a") as samples:
        samples.write(json.dumps(half_a_character) + "\n")
    page = read_report(run)
    assert not {"script", "i"} & set(page.tags)
    assert "<i>run & co" in page.text
    squeezed = re.sub(r"\s", "", page.text)
    assert re.sub(r"\s", "", story) in squeezed
    assert "?|" in page.text


def test_the_articles_of_a_story_are_marked_and_the_prompt_is_not(tmp_path):
    run = make_run(tmp_path / "run", text="Once upon a time there was the cat, then an owl. A thing.")
    page = write_report(run).read_text()
    marked = re.findall(r"<mark>(.*?)</mark>", page)
    assert set(marked) == {"the", "an", "A"}
    assert '<span class="prompt">Once upon a time</span>' in page


@pytest.mark.parametrize("num_updates", [0, 1, 3])
def test_a_run_that_has_just_begun_has_a_report(tmp_path, num_updates):
    run = make_run(tmp_path / "run", num_updates=num_updates)
    page = read_report(run)
    assert ("Under way" if num_updates else f"No update of {NUM_UPDATES} is logged yet") in page.text
    assert "No evaluation yet" in page.text
    assert "No story yet" in page.text
    assert page.tags.count("svg") == (5 if num_updates else 0)


def test_a_run_without_metrics_or_samples_has_a_report(tmp_path):
    run = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "samples.jsonl"):
        (run / name).unlink()
    assert "metrics.jsonl has no update yet" in read_report(run).text


def test_a_line_that_is_still_being_written_is_left_for_the_next_time(tmp_path):
    run = make_run(tmp_path / "run")
    cut_off(run / "metrics.jsonl", 40)
    cut_off(run / "samples.jsonl", 5)
    page = read_report(run)
    assert f"Under way, at update {NUM_UPDATES - 1} of {NUM_UPDATES}" in page.text
    assert "damaged" not in page.text.replace("missing or damaged", "")


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
    run = make_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().split("\n")
    lines[3], lines[4] = "{broken", '{"update": 5, "train/loss": "much", "valid/loss": [], "tokens": true}'
    (run / "metrics.jsonl").write_text("\n".join(lines))
    (run / "samples.jsonl").write_text('{"update": 5, "prompt": 3}\n')
    (run / "evaluation.json").write_text('{"scores": [3]}')
    (run / "environment.json").write_text("[]")
    page = read_report(run)
    for words in (
        "metrics.jsonl: 1 damaged line left out",
        "samples.jsonl: 1 rows without a prompt and a text",
        "evaluation.json: cannot be read",
        "environment.json: cannot be read",
        f"Finished: {NUM_UPDATES} updates",
    ):
        assert words in page.text


def test_metrics_without_seconds_leave_out_one_curve_and_say_so(tmp_path):
    page = read_report(make_run(tmp_path / "run", seconds=False))
    assert "have no seconds, so this curve cannot be drawn" in page.text
    assert "Not measured yet" in page.text
    assert page.tags.count("svg") == 5


@pytest.mark.parametrize("kind", ["missing", "a file", "an empty folder", "a broken config", "another config"])
def test_what_is_no_run_is_refused_by_name(tmp_path, kind):
    folder = tmp_path / "run"
    if kind == "a file":
        folder.write_text("")
    elif kind != "missing":
        folder.mkdir()
    if "config" in kind:
        (folder / "config.json").write_text("{" if kind == "a broken config" else "{}")
    with pytest.raises(UserError, match=re.escape(str(folder / "config.json"))):
        write_report(folder)


def test_a_run_under_way_is_told_from_one_that_stopped(tmp_path):
    run = make_run(tmp_path / "run", num_updates=10)
    with recorded_start(run):
        assert "Under way, at update 10 of 20" in read_report(run).text
    assert "Stopped at update 10 of 20, on 20" in read_report(run).text
    with recorded_start(run):
        an_hour_ago = time.time() - 3600
        os.utime(run / "metrics.jsonl", (an_hour_ago, an_hour_ago))
        assert "Stopped or held up at update 10 of 20" in read_report(run).text


def test_a_run_out_of_patience_is_said_to_have_stopped_early(tmp_path):
    run = make_run(tmp_path / "run", num_updates=15, eval__early_stopping_patience=1)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["valid/loss"] = 9.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with recorded_start(run):
        pass
    assert "Stopped early at update 15 of 20" in read_report(run).text


def test_the_environment_of_each_start_is_shown(tmp_path):
    run = make_run(tmp_path / "run")
    for _ in range(2):
        with recorded_start(run):
            pass
    starts = read_run(run).starts
    assert len(starts) == 2
    page = read_report(run)
    for words in ("orbax-checkpoint", starts[0]["versions"]["jax"], starts[1]["started"], "The last of 2 starts"):
        assert words in page.text


def test_scores_are_shown_beside_those_of_real_stories(tmp_path):
    run = make_run(tmp_path / "run")
    write_evaluation(run, articles=(0.94, 0.93, 0.95), grammar=(6.91, 6.6, 7.2))
    page = read_report(run)
    for words in ("6.910", "6.600 to 7.200", "9.250", "9.100 to 9.400", "PASS", "FAIL", "200 stories"):
        assert words in page.text
    assert "200 stories of the checkpoint of update 20, temperature 1" in page.text
    assert "This command measures" not in page.text


def test_many_evaluations_are_thinned_and_the_best_stays(tmp_path):
    run = make_run(tmp_path / "run", num_updates=300, train__max_updates=300)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[84]["valid/loss"] = 0.5
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = read_report(run)
    assert "85 best" in page.text
    assert "evaluations between these are left out" in page.text
    assert page.tags.count("blockquote") == len(PROMPTS)


def test_it_starts_no_jax(tmp_path):
    run = make_run(tmp_path / "run")
    code = "import sys; from pathlib import Path; from tinystories_jax.analysis.report import write_report; "
    code += f"write_report(Path({str(run)!r})); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_rows_out_of_order_twice_over_or_of_no_update_are_said(tmp_path):
    run = make_run(tmp_path / "run")
    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    strange = [{**rows[0], "update": update} for update in (0, -400, 10**6)]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in [*reversed(rows), rows[3], *strange]))
    found = read_run(run)
    assert found.rows == rows
    assert found.problems == (
        "metrics.jsonl: 3 rows of no update from 1 to 20 left out",
        "metrics.jsonl: updates out of order or twice over; the last row of each is taken",
    )
    assert "Finished: 20 updates." in read_report(run).text


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "samples.jsonl", "evaluation.json", "environment.json"]
)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused(tmp_path, name, make):
    run = make_run(tmp_path / "run")
    (run / name).unlink(missing_ok=True)
    make(run / name)
    with pytest.raises(UserError, match=f"{name} is not a regular file; move it away"):
        read_run(run)


@pytest.mark.parametrize("count", [-1, 10**400, "9", True])
def test_a_config_of_absurd_counts_is_refused(tmp_path, count):
    run = make_run(tmp_path / "run")
    values = json.loads((run / "config.json").read_text())
    values["model"]["vocab_size"] = count
    (run / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"config\.json: cannot be read as a run's config.* writes it again"):
        read_run(run)


def test_a_config_of_a_gigabyte_is_not_read(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "config.json").open("ab") as file:
        file.truncate(2**30)
    with pytest.raises(UserError, match=r"config\.json has 1,073,741,824 bytes"):
        read_run(run)
