"""A comparison says that sides differ only where the difference is larger than the noise."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from tests.analysis.make_run import PROMPTS, make_run, write_evaluation
from tests.test_cli import error_line, run_script, script_environment
from tinystories_jax.analysis.compare import NO_DIFFERENCE, NOT_COMPARABLE, OTHER_TEMPERATURES, compare
from tinystories_jax.analysis.compare_output import to_markdown, to_text, write_comparison_page
from tinystories_jax.analysis.noise import compare_to_noise, t_quantile, welch_interval
from tinystories_jax.errors import UserError

BITS = "bits per byte, at the best loss"


def judged(comparison, name):
    (judgement,) = [item for item in comparison.judgements if item.name == name]
    return judgement


def verdict_on(comparison, name):
    verdict = judged(comparison, name).verdict
    assert verdict is not None
    return verdict


def cells(comparison, name):
    (row,) = [row for row in comparison.rows if row.name == name]
    return row.cells


def make_pairs(folder, first, second, **fields_of_second):
    """Returns runs of two seeds on either side, by their validation losses."""
    runs = [make_run(folder / f"a{seed}", seed=seed, loss=loss) for seed, loss in enumerate(first)]
    for seed, loss in enumerate(second):
        runs.append(make_run(folder / f"b{seed}", seed=seed, loss=loss, **fields_of_second))
    return runs


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062047), (1.5, 6.0166631), (2, 4.3026527), (3, 3.1824463), (10, 2.2281389), (30, 2.0422725)],
)
def test_the_t_quantile_is_that_of_the_tables(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, rel=1e-7)


def test_the_t_quantile_becomes_the_normal_one():
    assert t_quantile(1e6) == pytest.approx(1.959964, rel=1e-5)


def test_welch_by_hand():
    # Means 2 and 6, variances 1 and 4 over 3 and 2 values: 1/3 + 2 = 7/3; degrees (7/3)^2 / ((1/3)^2/2 + 2^2/1).
    low, high = welch_interval([1.0, 2.0, 3.0], [6 - math.sqrt(2), 6 + math.sqrt(2)]) or (0.0, 0.0)
    reach = t_quantile((7 / 3) ** 2 / ((1 / 3) ** 2 / 2 + 4)) * math.sqrt(7 / 3)
    assert (low, high) == (pytest.approx(4 - reach), pytest.approx(4 + reach))


def test_two_seeds_that_vary_as_much_as_the_sides_differ_find_nothing():
    assert compare_to_noise([1.0, 1.2], [1.1, 1.3]).found is False
    assert compare_to_noise([1.0, 1.001], [1.1, 1.101]).found is True
    # Larger than either spread by far, and still not at two seeds: 1 degree of freedom is 12.7 standard errors.
    assert compare_to_noise([1.0, 1.0], [1.1, 1.12]).found is False


def test_seeds_beat_intervals_and_intervals_beat_nothing():
    apart = [(0.9, 1.1)], [(1.2, 1.4)]
    assert compare_to_noise([1.0], [1.3], *apart).found is True
    assert compare_to_noise([1.0], [1.3], [(0.9, 1.25)], [(1.2, 1.4)]).found is False
    assert compare_to_noise([1.0, 1.5], [1.3, 1.2], apart[0] * 2, apart[1] * 2).found is False
    assert compare_to_noise([1.0], [1.3]).why == "one seed per side: no noise estimate"
    assert compare_to_noise([1.0, 1.1], [1.3]).why == "one seed on one side: no noise estimate"
    assert compare_to_noise([1.0, 1.0], [1.3, 1.3]).found is None


def test_runs_that_differ_in_their_seed_alone_are_one_side(tmp_path):
    runs = make_pairs(tmp_path, [2.0, 2.01], [1.5, 1.51], train__article_loss_weight=10.0)
    comparison = compare(runs)
    assert comparison.legend == (
        ("A", "a0, a1", ""),
        ("B", "b0, b1", "train.article_loss_weight 10.0 instead of 1.0"),
    )


def test_what_changes_neither_model_nor_data_makes_no_other_side(tmp_path):
    first = make_run(tmp_path / "a", seed=0)
    second = make_run(tmp_path / "b", seed=1, data__cache_dir="elsewhere", logging__every=3)
    comparison = compare([first, second])
    assert len(comparison.sides) == 1
    assert "One side" in comparison.conclusion
    assert comparison.judgements == ()


def test_the_same_seed_again_is_another_side_so_that_patched_code_is_not_taken_for_noise(tmp_path):
    comparison = compare(make_pairs(tmp_path, [2.0, 2.01], [3.0, 3.01]))
    assert [side.names for side in comparison.sides] == ["a0, a1", "b0, b1"]
    assert "nothing that the configs tell" in comparison.legend[1][2]
    assert verdict_on(comparison, BITS).found


def test_other_training_stories_are_another_side_even_as_many_of_them(tmp_path):
    runs = [
        make_run(tmp_path / name, seed=seed, data__source="files", data__train_files=name, data__valid_files="v")
        for seed, name in enumerate("ab")
    ]
    comparison = compare(runs)
    assert [side.names for side in comparison.sides] == ["a", "b"]
    assert "training stories files b instead of files a" in comparison.legend[1][2]


def test_another_tokenizer_is_another_side_whose_loss_does_not_compare(tmp_path):
    runs = make_pairs(tmp_path, [2.0, 2.01], [1.5, 1.51], tokenizer="two")
    comparison = compare(runs)
    assert comparison.legend[1][2] == "another tokenizer"
    loss = judged(comparison, "validation loss, best, nats per token")
    assert (loss.said, loss.verdict) == (NOT_COMPARABLE, None)
    assert cells(comparison, "validation loss, best, nats per token (not comparable)")
    assert verdict_on(comparison, BITS).found


def test_scores_at_other_temperatures_do_not_compare(tmp_path):
    runs = make_pairs(tmp_path, [2.0, 2.01], [2.0, 2.01])
    for run, temperature in zip(runs, (1.0, 1.0, 0.8, 0.8), strict=True):
        write_evaluation(run, articles=(0.9, 0.8, 1.0), grammar=(8.0, 7.0, 9.0), temperature=temperature)
    comparison = compare(runs)
    for name in ("articles, evaluate.py", "grammar of 10, evaluate.py"):
        assert judged(comparison, name).said == OTHER_TEMPERATURES
    assert verdict_on(comparison, BITS).found is False


def test_runs_of_one_name_that_were_written_otherwise_are_told_of(tmp_path):
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", seed=1)]
    for run, temperature in zip(runs, (1.0, None), strict=True):
        write_evaluation(run, articles=(0.9, 0.8, 1.0), grammar=(8.0, 7.0, 9.0), temperature=temperature)
    told = "a/run 200 stories at temperature 1; b/run 200 stories at an unknown temperature."
    assert any(told in doubt for doubt in compare(runs).doubts)


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    folders = [make_run(tmp_path / name, seed=seed) for seed, name in enumerate(("a/x/run", "b/x/run", "b/y/run", "c"))]
    (side,) = compare(folders).sides
    assert [run.name for run in side.runs] == ["a/x/run", "b/x/run", "y/run", "c"]


def test_a_score_that_some_runs_of_a_side_lack_says_how_many_have_it(tmp_path):
    runs = make_pairs(tmp_path, [2.0, 2.01], [1.0], optim__weight_decay=0.0)
    write_evaluation(runs[0], articles=(0.9, 0.8, 1.0), grammar=(8.0, 7.0, 9.0))
    assert cells(compare(runs), "grammar of 10, evaluate.py") == ("8.00 (95 %: 7.00 to 9.00, 1 of 2 runs)", "–")


def test_scores_at_an_unknown_temperature_do_not_compare(tmp_path):
    runs = make_pairs(tmp_path, [2.0], [1.0], optim__weight_decay=0.0)
    for run, temperature in zip(runs, (1.0, None), strict=True):
        write_evaluation(run, articles=(0.9, 0.8, 1.0), grammar=(8.0, 7.0, 9.0), temperature=temperature)
    assert judged(compare(runs), "articles, evaluate.py").said == OTHER_TEMPERATURES


def test_a_difference_larger_than_the_noise_is_found(tmp_path):
    comparison = compare(make_pairs(tmp_path, [2.0, 2.002], [1.5, 1.502], optim__weight_decay=0.0))
    verdict = verdict_on(comparison, BITS)
    assert verdict.found
    assert verdict.difference == pytest.approx(-0.5 / (4 * math.log(2)))
    assert judged(comparison, BITS).said == "larger than the noise"
    assert comparison.conclusion.startswith("Larger than the noise: validation loss")


def test_no_difference_is_said_to_be_none(tmp_path):
    comparison = compare(make_pairs(tmp_path, [2.0, 2.1], [2.05, 2.12], optim__weight_decay=0.0))
    assert judged(comparison, BITS).said == NO_DIFFERENCE
    assert comparison.conclusion.startswith("No difference found")
    assert NO_DIFFERENCE in to_text(comparison)
    assert comparison.conclusion.endswith("a third seed shows smaller ones.")


def test_one_seed_per_side_says_nothing(tmp_path):
    comparison = compare(make_pairs(tmp_path, [2.0], [1.0], optim__weight_decay=0.0))
    assert judged(comparison, BITS).said == "one seed per side: no noise estimate"
    assert comparison.conclusion.startswith("No noise estimate")


def test_the_intervals_of_scores_decide_where_seeds_do_not(tmp_path):
    runs = make_pairs(tmp_path, [2.0], [1.0], optim__weight_decay=0.0)
    write_evaluation(runs[0], articles=(0.90, 0.88, 0.92), grammar=(7.0, 6.5, 7.5))
    write_evaluation(runs[1], articles=(0.97, 0.96, 0.98), grammar=(7.4, 6.9, 7.9))
    comparison = compare(runs)
    assert verdict_on(comparison, "articles, evaluate.py").found is True
    assert judged(comparison, "grammar of 10, evaluate.py").said == NO_DIFFERENCE
    assert cells(comparison, "articles, evaluate.py")[0] == "90.0% (95 %: 88.0% to 92.0%)"


def test_the_figures_are_those_of_the_runs(tmp_path):
    comparison = compare(make_pairs(tmp_path, [2.0, 2.2], [2.0], model__tie_embeddings=False))
    # The tiny model: 61 tokens, 32 wide, 2 layers of 2 norms, 4 heads and 2 key-value heads of width 8, 48 forward.
    other = 2 * (2 * 32 + 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) + 32
    assert cells(comparison, "parameters in embeddings") == ("1,952", "3,904")
    assert cells(comparison, "other parameters") == (f"{other:,}", f"{other:,}")
    assert cells(comparison, "tokens seen") == ("2,560", "2,560")
    assert cells(comparison, "story bytes seen, about") == ("10,240", "10,240")
    flops = 2560 * (6 * (other + 1952) + 6 * 16 * 32 * 2)
    assert cells(comparison, "training FLOPs") == (f"{flops / 1e6:.3g}\u00a0M",) * 2
    assert cells(comparison, "wall time")[0] == "1.0 min"
    assert cells(comparison, "validation loss, best, nats per token")[0] == "2.1000 (2.0000 to 2.2000)"


def test_what_makes_a_comparison_doubtful_is_said(tmp_path):
    runs = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", seed=1, num_updates=10),
        make_run(tmp_path / "c", seed=2, eval__max_batches=3),
        make_run(tmp_path / "d", seed=3, data__source="files", data__train_files="t", data__valid_files="v"),
        make_run(tmp_path / "e", seed=4, sample__temperature=0.2, sample__max_new_tokens=7),
    ]
    write_evaluation(runs[0], articles=(0.9, 0.8, 1.0), grammar=(8.0, 7.0, 9.0))
    write_evaluation(runs[1], articles=(0.9, 0.8, 1.0), grammar=(8.0, 7.0, 9.0), temperature=0.8)
    metrics = runs[3] / "metrics.jsonl"
    metrics.write_text(re.sub(r'("valid/bits_per_byte": )', r"\g<1>1", metrics.read_text()))
    doubts = " ".join(compare(runs).doubts)
    for words in (
        *("b has 10 of 20 updates", "eval.max_batches differs", "name different validation stories"),
        "d was validated on other stories than a",
        *("sample.temperature differs: the scores of the runs' samples", "sample.max_new_tokens differs"),
        "such scores do not compare: a 200 stories at temperature 1; b 200 stories at temperature 0.8.",
    ):
        assert words in doubts


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("grammar_interval", [9.0, 7.0]),
        ("grammar_interval", [None, 9.0]),
        ("grammar_interval", "12"),
        ("grammar_interval", [10**400, 10**401]),
        ("criteria", [{"name": "loss", "passed": "FAIL", "figure": "3"}]),
        ("scores", [{"name": "grammar", "interval": [math.nan, math.nan]}]),
    ],
)
def test_scores_that_nobody_measured_are_no_scores(tmp_path, key, value):
    run = make_run(tmp_path / "run")
    write_evaluation(run, articles=(0.9, 0.8, 1.0), grammar=(8.0, 7.0, 9.0))
    path = run / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    comparison = compare([run, make_run(tmp_path / "other", seed=1)])
    assert "run: evaluation.json: cannot be read as scores" in " ".join(comparison.doubts)
    assert "grammar of 10, evaluate.py" not in [row.name for row in comparison.rows]
    assert comparison.conclusion.endswith("Mind the doubts listed with it.")


def test_scores_of_another_checkpoint_than_the_best_are_doubtful(tmp_path):
    run = make_run(tmp_path / "run")
    write_evaluation(run, articles=(0.9, 0.8, 1.0), grammar=(8.0, 7.0, 9.0))
    path = run / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checkpoint_update": 5}))
    doubts = compare([run, make_run(tmp_path / "other", seed=1)]).doubts
    assert doubts == ("run was scored by evaluate.py at update 5, its best is 20.",)


def test_all_that_is_no_run_is_refused_at_once(tmp_path):
    run = make_run(tmp_path / "run")
    without = make_run(tmp_path / "without", seed=1)
    (without / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError) as caught:
        compare([run, tmp_path / "none", run, without])
    assert len(caught.value.problems) == 3
    for words in ("none/config.json does not exist", "run is given twice", "tokenizer.json does not exist"):
        assert words in str(caught.value)


def test_runs_without_an_evaluation_are_compared_in_what_they_have(tmp_path):
    comparison = compare([make_run(tmp_path / "a", num_updates=0), make_run(tmp_path / "b", num_updates=2, seed=1)])
    assert "bits per byte, final" not in [row.name for row in comparison.rows]
    write_comparison_page(comparison, tmp_path / "compare.html")
    assert to_markdown(comparison).startswith("# Comparison")


def test_markdown_shows_stories_as_they_are(tmp_path):
    story = "Once upon a time <b>*the*</b> | cat_\n- one\n1. two\n# three"
    runs = [make_run(tmp_path / "a", text=story), make_run(tmp_path / "b", seed=1, optim__beta1=0.5)]
    page = to_markdown(compare(runs))
    assert r"> Once upon a time \<b\>\*the\*\</b\> \| cat\_" in page
    assert "\n> \\- one" in page
    assert "\n> 1\\. two" in page
    assert "\n> \\# three" in page
    assert "## Stories: Tom had" in page


def test_the_script_prints_the_figures_and_writes_both_pages(tmp_path):
    runs = make_pairs(tmp_path, [2.0, 2.002], [1.5, 1.502], optim__weight_decay=0.0)
    # No such platform: a comparison starts no device, and takes no memory of a GPU that trains.
    environment = script_environment(JAX_PLATFORMS="none")
    result = run_script("compare", *map(str, runs), f"--output={tmp_path / 'out'}", environment=environment)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for words in (
        "A  a0, a1",
        "B  b0, b1: optim.weight_decay 0.0 instead of 0.1",
        "Larger than the noise",
        "compare.md",
    ):
        assert words in result.stdout
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("<svg") == 3
    assert all(prompt in page for prompt in PROMPTS)
    parser = HTMLParser()
    parser.feed(page)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.html", "compare.md"]


def test_one_run_is_too_few(tmp_path):
    assert "RUN is missing: needed 2, given 1" in error_line(run_script("compare", str(tmp_path)))
