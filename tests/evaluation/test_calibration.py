"""What the scores can see, on real stories and on the same stories spoiled to a known degree."""

import gzip
import itertools
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tinystories_jax.data.sample import iter_sample
from tinystories_jax.errors import UserError
from tinystories_jax.evaluation.articles import NEEDED, UNLIKELY
from tinystories_jax.evaluation.calibration import (
    RATES,
    SPOILERS,
    format_table,
    halve,
    make_reference,
    read_stories,
    score_spoiled,
    spoil,
)
from tinystories_jax.evaluation.checker import CHECKER
from tinystories_jax.evaluation.grammar import (
    GRAMMAR_SCALE,
    read_reference,
    real_scores,
    score_stories,
    shipped_reference,
)
from tinystories_jax.evaluation.sentences import normalise

ROOT = Path(__file__).parents[2]
TEXT = "A cat was sad. I saw the dog. “Don't they have an owl?” she asked."


@pytest.fixture(scope="module")
def held_out(tinystories_data) -> list[str]:
    """Returns the real stories that neither the counts nor the faults of real stories come from."""
    return halve(read_stories(str(tinystories_data / "valid.txt"))[0])[1]


@pytest.mark.parametrize(
    ("way", "spoiled"),
    [
        ("articles dropped", 'Cat was sad. I saw dog. "Don\'t they have owl?" she asked.'),
        ("agreement broken", 'A cat were sad. I saw the dog. "Doesn\'t they has an owl?" she asked.'),
        ("words swapped", 'Cat A sad was. Saw I dog the. "They Don\'t an have owl?" she asked.'),
        ("small words deleted", 'A cat sad. Saw the dog. "Don\'t have an owl?" asked.'),
    ],
)
def test_a_way_of_spoiling_takes_every_opportunity_at_rate_one(way, spoiled):
    assert spoil(TEXT, way, 1.0, seed=0) == spoiled


@pytest.mark.parametrize(
    ("text", "spoiled"),
    [("He was in the park.", "The park."), ("So he was at my house. At the end he ran.", "House. The end ran.")],
)
def test_small_words_that_follow_each_other_are_deleted_whole(text, spoiled):
    assert spoil(text, "small words deleted", 1.0, seed=0) == spoiled


def test_doubled_words_double_the_words():
    assert spoil("The cat's here.", "words doubled", 1.0, seed=0) == "The The cat's cat's here here."


@pytest.mark.parametrize("way", SPOILERS)
def test_more_is_spoiled_at_a_higher_rate(way):
    lines = [TEXT] * 50
    changed = []
    for rate in (0.0, 0.02, 0.1, 1.0):
        spoiled = [spoil(line, way, rate, seed=seed) for seed, line in enumerate(lines)]
        changed.append({index for index, line in enumerate(spoiled) if line != normalise(TEXT)})
    assert changed[0] == set()
    assert changed[0] < changed[1] < changed[2] < changed[3] == set(range(50))


def test_too_few_stories_to_halve_are_refused():
    with pytest.raises(UserError, match="3 held-out stories"):
        halve([TEXT] * 3)


@pytest.mark.slow
def test_the_shipped_reference_is_what_the_real_stories_give(tinystories_data, held_out):
    train, train_source = read_stories(str(tinystories_data / "train.txt"))
    valid, valid_source = read_stories(str(tinystories_data / "valid.txt"))
    reference = make_reference(train, halve(valid)[0], {"counted": train_source, "held_out": valid_source})
    shipped = shipped_reference()
    assert reference.source == shipped.source
    assert reference.real_faults_per_100_words == pytest.approx(shipped.real_faults_per_100_words)
    # Read from JSON, pairs are lists.
    assert json.loads(json.dumps(reference.articles.__dict__)) == shipped.articles.__dict__
    real = score_stories(held_out, finished=[True] * len(held_out), reference=reference)
    assert real.grammar_interval == pytest.approx(real_scores().grammar_interval)
    assert real.articles == pytest.approx(real_scores().articles)


def test_the_shipped_reference_tells_what_it_was_made_with():
    path = ROOT / "tinystories_jax" / "evaluation" / "reference.json.gz"
    values = json.loads(gzip.decompress(path.read_bytes()))
    assert values["checker"] == CHECKER
    assert values["thresholds"] == {"needed": NEEDED, "unlikely": UNLIKELY, "grammar_scale": GRAMMAR_SCALE}
    assert values["source"]["counted"]["num_stories"] == values["articles"]["num_stories"]


def test_the_script_prints_the_table_and_writes_a_reference(tmp_path):
    for name, split, num in (("train", "train", 60), ("valid", "validation", 40)):
        stories = itertools.islice(iter_sample(split), num)
        (tmp_path / f"{name}.txt").write_text("\n<|endoftext|>\n".join(stories))
    output = tmp_path / "reference.json.gz"
    result = subprocess.run(
        [
            sys.executable,
            "scripts/calibrate.py",
            f"--train_files={tmp_path / 'train.txt'}",
            f"--valid_files={tmp_path / 'valid.txt'}",
            f"--output={output}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n| ") == 2 + len(SPOILERS) * len(RATES)
    reference, real = read_reference(output)
    assert reference.source["counted"]["num_stories"] == 60
    assert reference.source["held_out"]["files"] == "valid.txt"
    assert real.num_stories == 20


@pytest.mark.slow
def test_real_stories_score_high_and_a_tenth_of_the_articles_is_missed(held_out):
    stories = held_out[:200]
    real = score_stories(stories)
    assert real.grammar >= 9.0
    assert real.clean_sentences >= 9.0
    assert real.articles >= 0.96
    spoiled = score_stories([spoil(story, "articles dropped", 0.1, seed=seed) for seed, story in enumerate(stories)])
    assert spoiled.grammar_interval.high < real.grammar_interval.low
    assert spoiled.articles_interval.high < real.articles_interval.low
    assert spoiled.clean_sentences_interval.high < real.clean_sentences_interval.low


@pytest.mark.slow
def test_scores_fall_with_every_further_fault(held_out):
    stories = held_out[:40]
    real = score_stories(stories)
    table = score_spoiled(stories, shipped_reference())
    rows = defaultdict(list)
    for row in table:
        rows[row.way].append(row.scores)
    assert list(rows) == list(SPOILERS)
    for way, scores in rows.items():
        for name in ("grammar", "clean_sentences"):
            figures = [getattr(real, name), *(getattr(score, name) for score in scores)]
            assert all(higher > lower for higher, lower in itertools.pairwise(figures)), (
                way,
                name,
                figures,
            )
    dropped = rows["articles dropped"]
    shares = [real.articles, *(score.articles for score in dropped)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] <= 0.3
    assert dropped[-1].grammar < 5.0
    assert f"| articles dropped | 100% | {dropped[-1].grammar:.2f} |" in format_table(real, table)


def test_the_guards_tell_articles_that_do_not_belong(held_out):
    stories = held_out[:40]
    real = score_stories(stories, check_grammar=False)
    assert real.articles_per_100_words == pytest.approx(10, abs=1.5)
    assert real.articles_actual_to_expected == pytest.approx(1.06, abs=0.1)
    assert real.articles_unlikely < 0.02
    # Full marks for an article before every word, but for the guards.
    greedy = score_stories([" the ".join(story.split()) for story in stories], check_grammar=False)
    assert greedy.articles > 0.9
    assert greedy.articles_unlikely > 0.3
    assert greedy.articles_per_100_words > 30
