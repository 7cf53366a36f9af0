"""The judge against a local endpoint that answers, stumbles, refuses, or talks nonsense."""

import dataclasses
import email.utils
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.judge_stand_in import KEY, MARKS, JudgeServer, Reply, judge_stand_in
from tests.test_cli import ROOT, script_environment
from tinystories_jax.errors import UserError
from tinystories_jax.evaluation.judge import RUBRIC, Judge, judge_stories, read_judge

STORIES = [("Once", f"Once upon a time there were {number} cats.") for number in range(6)]


def make_judge(server: JudgeServer, cache: Path | None = None, model: str = "some/model", **fields: Any) -> Judge:
    judge = read_judge(f"openai:{model}", {"OPENAI_BASE_URL": f"{server.url}/", "OPENAI_API_KEY": KEY}, cache)
    assert judge is not None
    return dataclasses.replace(judge, first_pause_seconds=0.01, **fields)


def marks(**changed: Any) -> str:
    return json.dumps({**MARKS, **changed})


def test_every_story_is_sent_with_the_rubric_and_its_beginning_marked():
    with judge_stand_in() as server:
        scores = judge_stories(STORIES, make_judge(server))
    assert sorted(server.asked) == [f"Once*** upon a time there were {number} cats." for number in range(6)]
    for path, headers, body in server.requests:
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == f"Bearer {KEY}"
        assert body["model"] == "some/model"
        assert body["messages"][0] == {"role": "system", "content": RUBRIC}
    assert (scores.num_judged, scores.num_unjudged, scores.problem) == (6, 0, None)
    assert scores.marks == {"grammar": 7, "creativity": 5, "consistency": 6.5}
    assert scores.age_groups == {"6-7": 6}


def test_the_figures_are_means_with_intervals():
    def reply(number: int, body: dict[str, Any]) -> Reply:
        cats = int(body["messages"][-1]["content"].split()[-2])
        return Reply(marks(grammar=cats + 1, age_group="4-5" if cats else "13-16"))

    stories = [("Once", f"Once, {day} days ago, there were {cats} cats.") for day in range(4) for cats in range(6)]
    with judge_stand_in(reply) as server:
        scores = judge_stories(stories, make_judge(server))
    assert scores.marks["grammar"] == pytest.approx(3.5)
    assert 1 < scores.intervals["grammar"].low < 3.5 < scores.intervals["grammar"].high < 6
    assert scores.age_groups == {"4-5": 20, "13-16": 4}


def test_equal_stories_are_sent_once():
    with judge_stand_in() as server:
        scores = judge_stories([STORIES[0]] * 5, make_judge(server))
    assert len(server.requests) == 1
    assert scores.num_judged == 5


@pytest.mark.parametrize(
    "content",
    [
        f"```json\n{marks()}\n```",
        f"<think>{{maybe}} {marks(grammar=2)}</think> Here you are: {marks()}",
        json.dumps(MARKS, indent=4),
    ],
)
def test_an_answer_is_found_in_what_surrounds_it(content):
    with judge_stand_in(lambda number, body: Reply(content)) as server:
        assert judge_stories(STORIES[:1], make_judge(server)).marks["grammar"] == 7


@pytest.mark.parametrize(
    "stumble",
    [
        Reply(status=429, headers={"Retry-After": "0"}),
        Reply(status=429, headers={"Retry-After": "soon"}),
        Reply(status=429, headers={"Retry-After": "nan"}),
        Reply(status=429, headers={"Retry-After": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"}),
        Reply(status=429, headers={"Retry-After": "Mon, 99 Jan 2030 99:00:00 +99999999"}),
        Reply(status=503),
        Reply(status=500, body=b"<html>oops</html>"),
        Reply(content=None),
        Reply(seconds=5),
        Reply(body=b"-5\r\n", headers={"Transfer-Encoding": "chunked"}),
    ],
    ids=["in 0 s", "soon", "nan", "in 10^20 years", "on no day", "overloaded", "broken", "silent", "slow", "no HTTP"],
)
def test_what_passes_is_waited_for(stumble):
    # Every story stumbles twice at first.
    def reply(number: int, body: dict[str, Any]) -> Reply:
        return stumble if server.asked.count(body["messages"][-1]["content"]) <= 2 else Reply()

    with judge_stand_in(reply) as server:
        began = time.monotonic()
        scores = judge_stories(STORIES[:2], make_judge(server, timeout_seconds=1 if stumble.seconds else 60))
    assert (scores.num_judged, scores.problem) == (2, None)
    assert len(server.requests) == 6
    assert time.monotonic() - began < 9


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_endpoint_says_how_long_to_wait(form):
    def reply(number: int, body: dict[str, Any]) -> Reply:
        if number:
            return Reply()
        wait = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
        return Reply(status=429, headers={"Retry-After": wait})

    with judge_stand_in(reply) as server:
        began = time.monotonic()
        assert judge_stories(STORIES[:1], make_judge(server)).num_judged == 1
    assert 0.9 < time.monotonic() - began < 5


def test_an_endpoint_that_never_answers_is_given_up_and_what_was_answered_is_kept(tmp_path):
    broken = True

    def reply(number: int, body: dict[str, Any]) -> Reply:
        return (
            Reply(status=503, body=b"busy") if broken and "0 cats" not in body["messages"][-1]["content"] else Reply()
        )

    stories = STORIES + [("", f"Story {number}") for number in range(100)]
    with judge_stand_in(reply) as server:
        judge = make_judge(server, tmp_path / "judge.jsonl")
        scores = judge_stories(stories, judge)
        assert (scores.num_judged, scores.num_unjudged) == (1, 105)
        assert scores.problem is not None
        assert "503" in scores.problem
        assert "busy" in scores.problem
        assert len(server.requests) < 60  # not five times for each story
        broken = False
        scores = judge_stories(stories, judge)
    assert (scores.num_judged, scores.num_unjudged, scores.problem) == (106, 0, None)


def test_an_address_where_nobody_listens_is_a_problem_and_no_failure():
    with judge_stand_in() as server:
        judge = make_judge(server)
    scores = judge_stories(STORIES, judge)
    assert (scores.num_judged, scores.num_unjudged) == (0, 6)
    assert "refused" in str(scores.problem)
    assert math.isnan(scores.marks["grammar"])
    assert math.isnan(scores.intervals["grammar"].low)


@pytest.mark.parametrize("seconds_per_byte", [0.1, 0.005], ids=["before the headers end", "in the reply"])
def test_an_endpoint_that_drips_is_given_up(seconds_per_byte):
    with judge_stand_in(lambda number, body: Reply(seconds_per_byte=seconds_per_byte)) as server:
        began = time.monotonic()
        scores = judge_stories(STORIES, make_judge(server, timeout_seconds=0.3))
        assert time.monotonic() - began < 8
    assert (scores.num_judged, scores.refused) == (0, False)
    assert "takes too long" in str(scores.problem)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_script_while_it_waits_for_the_judge(number, code, tmp_path):
    (tmp_path / "stories.txt").write_text("Tom had a cat.")
    with judge_stand_in(lambda number, body: Reply(seconds_per_byte=0.2)) as server:
        process = subprocess.Popen(
            [sys.executable, "scripts/evaluate.py", f"--stories={tmp_path / 'stories.txt'}", "--judge=openai:m"],
            cwd=ROOT,
            env=script_environment(OPENAI_BASE_URL=server.url, OPENAI_API_KEY=KEY),
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            while not server.requests and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(number)
            try:
                _, stderr = process.communicate(timeout=15)
            finally:
                process.kill()
    assert process.returncode == code
    assert "Traceback" not in stderr


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_ends_asking_at_once_and_does_not_tell_the_key(status):
    body = f"no such thing\nfor {KEY} \x1b[31m".encode()
    with judge_stand_in(lambda number, sent: Reply(status=status, body=body)) as server:
        scores = judge_stories([("", str(number)) for number in range(100)], make_judge(server))
        assert len(server.requests) < 20
    problem = str(scores.problem)
    assert (scores.num_unjudged, scores.refused) == (100, True)
    assert f"HTTP {status}" in problem
    assert "no such thing" in problem
    assert KEY not in problem
    assert problem.isprintable()


def test_what_was_answered_before_a_refusal_is_kept(tmp_path):
    with judge_stand_in(lambda number, body: Reply(status=200 if number == 0 else 402)) as server:
        scores = judge_stories(STORIES, make_judge(server, tmp_path / "judge.jsonl"))
    assert (scores.num_judged, scores.num_unjudged, scores.refused) == (1, 5, True)
    assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("place", ["/v1/elsewhere", "http://[bad/", "http://example..com"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirection_is_not_followed(status, place):
    with judge_stand_in(lambda number, body: Reply(status=status, headers={"Location": place})) as server:
        scores = judge_stories(STORIES[:1], make_judge(server))
        assert [path for path, _, _ in server.requests] == ["/v1/chat/completions"]
    assert (scores.num_judged, scores.refused) == (0, True)
    assert f"to {place}" in str(scores.problem)


def test_https_to_a_port_without_it_is_a_refusal():
    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/v1"
        scores = judge_stories(STORIES[:1], Judge(url, KEY, "m", None))
        thread.join()
    assert scores.refused
    assert "SSL" in str(scores.problem)


@pytest.mark.parametrize(
    "reply",
    [
        Reply("Seven out of ten."),
        Reply(marks(grammar=11)),
        Reply(marks(creativity=0)),
        Reply(marks(consistency="8")),
        Reply(marks(grammar=True)),
        Reply(marks(grammar=float("nan"))),
        Reply(marks(age_group="a child")),
        Reply(json.dumps({"grammar": 7})),
        Reply("{}"),
        Reply("[" * 100_000),
        Reply(body=b'{"choices": []}'),
        Reply(body=b'{"choices": [{"message": {"content": null}}]}'),
        Reply(body=b"not JSON"),
        Reply(body=b"\xff\xfe"),
        Reply(body=b""),
    ],
    ids=lambda reply: repr(reply.body or reply.content)[:30],
)
def test_nonsense_is_asked_again_and_then_counted_as_unjudged(reply, tmp_path):
    def answer(number: int, body: dict[str, Any]) -> Reply:
        return reply if "0 cats" in body["messages"][-1]["content"] else Reply()

    with judge_stand_in(answer) as server:
        scores = judge_stories(STORIES[:2], make_judge(server, tmp_path / "judge.jsonl"))
    assert (scores.num_judged, scores.num_unjudged, scores.problem) == (1, 1, None)
    assert len(server.requests) == 3 + 1
    assert scores.marks["grammar"] == 7
    assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 1


def test_the_first_reply_that_can_be_read_counts():
    with judge_stand_in(lambda number, body: Reply("Well,") if number < 2 else Reply()) as server:
        assert judge_stories(STORIES[:1], make_judge(server)).num_judged == 1
    assert len(server.requests) == 3


def test_nothing_is_asked_twice_but_another_story_or_of_another_model(tmp_path):
    cache = tmp_path / "judge.jsonl"
    with judge_stand_in() as server:
        first = judge_stories(STORIES, make_judge(server, cache))
        assert judge_stories(STORIES, make_judge(server, cache)) == first
        assert len(server.requests) == 6
        judge_stories([("Once upon", STORIES[0][1]), *STORIES], make_judge(server, cache))
        assert len(server.requests) == 7
        judge_stories(STORIES[:1], make_judge(server, cache, model="other"))
        assert len(server.requests) == 8
    assert KEY not in cache.read_text()
    assert "cats" not in cache.read_text()


def test_a_damaged_cache_costs_the_damaged_answers_alone(tmp_path):
    cache = tmp_path / "judge.jsonl"
    with judge_stand_in() as server:
        judge_stories(STORIES, make_judge(server, cache))
        lines = cache.read_text().splitlines()
        lines[1], lines[2], lines[3] = "{", "[3]", lines[3].replace('"grammar": 7', '"grammar": 70')
        # The last line as a killed process leaves it.
        cache.write_text("\n".join(lines)[:-9])
        for _ in range(2):
            scores = judge_stories(STORIES, make_judge(server, cache))
            assert scores.num_judged == 6
            assert len(server.requests) == 6 + 4


def make_gigabyte(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**30)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.symlink_to(path.with_name("elsewhere")), "it is a link"),
        (os.mkfifo, "is not a regular file"),
        (Path.mkdir, "is not a regular file"),
        (make_gigabyte, "has 1,073,741,824 bytes"),
    ],
    ids=["link", "pipe", "folder", "gigabyte"],
)
@pytest.mark.parametrize("elsewhere", ["", "precious"])
def test_a_cache_that_is_no_file_of_the_run_is_refused_before_anything_is_asked(make, reason, elsewhere, tmp_path):
    cache = tmp_path / "judge.jsonl"
    if elsewhere:
        (tmp_path / "elsewhere").write_text(elsewhere)
    make(cache)
    refusal = rf"{cache}: cannot be read as the judge's answers \(.*{reason}.*\); move it away"
    with judge_stand_in() as server:
        with pytest.raises(UserError, match=refusal):
            make_judge(server, cache)
        with pytest.raises(UserError, match=refusal):
            judge_stories(STORIES, dataclasses.replace(make_judge(server), cache=cache))
        assert not server.requests
    assert [path.read_text() for path in tmp_path.glob("elsewhere")] == [elsewhere] * bool(elsewhere)


@pytest.mark.parametrize(
    ("flag", "environment", "said"),
    [
        ("openai:m", {}, "OPENAI_BASE_URL and OPENAI_API_KEY not set"),
        ("openai:m", {"OPENAI_API_KEY": KEY}, "OPENAI_BASE_URL not set"),
        ("openai:m", {"OPENAI_BASE_URL": "http://x/v1", "OPENAI_API_KEY": " "}, "OPENAI_API_KEY not set"),
        ("openai:m", {"OPENAI_BASE_URL": "x.org/v1", "OPENAI_API_KEY": KEY}, "OPENAI_BASE_URL=x.org/v1"),
        ("openai:m", {"OPENAI_BASE_URL": "file:///etc", "OPENAI_API_KEY": KEY}, "OPENAI_BASE_URL=file:///etc"),
        ("openai:m", {"OPENAI_BASE_URL": "http://x", "OPENAI_API_KEY": "a\nb"}, "OPENAI_API_KEY holds"),
        ("openai:a\x1b[31m", {}, "--judge=openai:a\ufffd[31m: the model's name"),
        ("openai:a\nb", {}, "the model's name"),
        ("\x1b[31m", {}, "--judge=\ufffd[31m: must be"),
        ("openai:", {}, "--judge=openai:"),
        ("gpt-4", {}, "must be openai:MODEL"),
    ],
)
def test_what_is_missing_is_said_in_one_line(flag, environment, said):
    with pytest.raises(UserError) as caught:
        read_judge(flag, environment, None)
    assert said in str(caught.value)
    assert len(caught.value.problems) == 1
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1",
        "http://[:::]/v1",
        "http://",
        "http://.",
        "http://:80/v1",
        "http://example..com/v1",
        "http://a%2e%2eb/v1",
        f"http://{'a' * 70}.org",
        "http://127.0.0.1:abc/v1",
        "http://x:0/v1",
        "http://x:99999/v1",
        "http://x/ü",
        "http://ü/v1",
        "http://x/\udc80",
        "http://x/\x1b[31m",
        "http://x/a b",
        "http://x/v1?a=b",
        "http://user:secret@x/v1",
        "http://user:secret/@x:abc/v1",
    ],
)
def test_an_address_that_cannot_be_asked_is_refused_at_the_start(url):
    with pytest.raises(UserError, match="OPENAI_BASE_URL") as caught:
        read_judge("openai:m", {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": KEY}, None)
    assert "secret" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("url", ["https://api.x.org/v1", "http://[::1]:8000/v1", "http://a_b:80", "http://10.0.0.1/"])
def test_an_address_that_can_be_asked_is_taken(url):
    judge = read_judge("openai:m", {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": KEY}, None)
    assert judge is not None
    assert judge.url == url.rstrip("/")


def test_without_the_flag_nobody_judges():
    assert read_judge("", {"OPENAI_BASE_URL": "http://x", "OPENAI_API_KEY": KEY}, None) is None
