"""The score of a model, or of stories that anybody wrote: figures, the same of real stories, criteria of success.

A checkpoint comes in, an `Evaluation` goes out; nothing here reads or writes a run.
"""

import importlib.resources
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinystories_jax.config import Config
from tinystories_jax.data.cache import TokenCache
from tinystories_jax.data.files import END_OF_STORY, iter_files
from tinystories_jax.data.prepare import find_cache
from tinystories_jax.data.tokenizer import END_OF_STORY_ID, StoryTokenizer
from tinystories_jax.errors import UserError
from tinystories_jax.evaluation.articles import NEEDED
from tinystories_jax.evaluation.checker import CHECKER, checker_problem
from tinystories_jax.evaluation.copies import longest_runs, score_copies
from tinystories_jax.evaluation.grammar import TextScores, real_scores, score_stories, shipped_reference
from tinystories_jax.evaluation.judge import Judge, JudgeScores, judge_stories
from tinystories_jax.evaluation.link_grammar import has_parser
from tinystories_jax.evaluation.results import Evaluation
from tinystories_jax.evaluation.samples import Story, check_prompts, write_stories
from tinystories_jax.evaluation.scorecard import Measured, list_criteria, list_figures, list_scores
from tinystories_jax.evaluation.validation import ValidationScores, cache_of_files, validate
from tinystories_jax.model.generate import Sampling
from tinystories_jax.model.transformer import Params
from tinystories_jax.streams import log_to_stderr

_PROMPTS = importlib.resources.files("tinystories_jax.evaluation") / "prompts.json"
_COMPARABLE_WORDS = 20_000  # that distinct words are counted in

Log = Callable[[str], None]


@dataclass(frozen=True)
class Writing:
    """How stories are written to be scored: from the prompts in turn, never changed afterwards."""

    num_stories: int = 200
    temperature: float = 1.0
    seed: int = 0


def evaluate_run(
    params: Params,
    tokenizer: StoryTokenizer,
    config: Config,
    *,
    title: str,
    update: int,
    fingerprints: tuple[str, str],
    data_files: str = "",
    writing: Writing = Writing(),
    judge: Judge | None = None,
    log: Log = log_to_stderr,
) -> Evaluation:
    """Returns the scores of a checkpoint: of its loss, and of stories that it writes.

    fingerprints: of the run's training and validation cache. data_files: comma-separated paths or globs, on whose
    stories the loss is measured; empty for the validation cache.
    """
    sampling = Sampling(temperature=writing.temperature)
    if writing.temperature == 0:  # a prompt's second story would be the first once more
        writing = replace(writing, num_stories=min(writing.num_stories, len(read_prompts())))
    prompts = list(itertools.islice(itertools.cycle(read_prompts()), writing.num_stories))
    context_length = config.data.sequence_length
    check_prompts(tokenizer, sorted(set(prompts)), context_length)
    splits = zip(("train", "validation"), fingerprints, strict=True)
    train, valid = (find_cache(config.data, split, fingerprint, tokenizer) for split, fingerprint in splits)
    loss, loss_on = _measure_loss(params, tokenizer, config, valid, data_files, log)
    if loss is not None and not math.isfinite(loss.loss):
        raise UserError(f"{title}: its loss on {loss_on} is {loss.loss}; take another checkpoint with --step")
    log(f"writing {len(prompts):,} stories")
    limits = {"seed": writing.seed, "max_new_tokens": context_length}
    stories = write_stories(params, tokenizer, config, prompts, sampling, **limits)
    texts = [story.text for story in stories]
    measured = Measured(
        text=_score_text(texts, [story.finished for story in stories], log),
        loss=loss,
        loss_on=loss_on,
        judge=_judge([(story.prompt, story.text) for story in stories], judge, log),
        temperature=writing.temperature,
        **_measure_copies(stories, tokenizer, train, valid),
    )
    notes = _describe_writing(writing, config, has_train_cache=train is not None) + _describe_doubles(texts)
    figures = {"checkpoint_update": update, **asdict(writing)}
    return _put_together(title, measured, notes, figures, [asdict(story) for story in stories])


def evaluate_file(files: str, *, limit: int, judge: Judge | None = None, log: Log = log_to_stderr) -> Evaluation:
    """Returns the scores of the first `limit` stories in `files`, as if a model had written them.

    Whether their author ended them is not known. Raises `UserError` for what cannot be read.
    """
    texts = read_texts(files, limit + 1)
    title = files if len(texts) <= limit else f"{files}, the first {limit:,} stories"
    return evaluate_texts(texts[:limit], title=title, judge=judge, log=log)


def evaluate_texts(
    texts: Sequence[str], *, title: str, judge: Judge | None = None, log: Log = log_to_stderr
) -> Evaluation:
    """Returns the scores of stories as if a model had written them."""
    measured = Measured(
        text=_score_text(texts, None, log),
        loss=None,
        loss_on="stories alone have none; give --checkpoint",
        judge=_judge([("", text) for text in texts], judge, log),
    )
    return _put_together(title, measured, _describe_doubles(texts), {})


def read_prompts() -> list[str]:
    """Returns the beginnings of stories that every model is scored on."""
    return json.loads(_PROMPTS.read_text(encoding="utf-8"))


def read_texts(files: str, limit: int) -> list[str]:
    """Returns the first `limit` stories of comma-separated paths or globs.

    Unlike stories to train on they are left as they are, mistakes of encoding and doubles included.
    """
    pieces = (piece.strip() for _, _, raw in iter_files(files) for piece in raw.split(END_OF_STORY))
    stories = list(itertools.islice(filter(None, pieces), limit))
    if not stories:
        raise UserError(f"{files}: holds no story to score")
    return stories


def _measure_loss(
    params: Params, tokenizer: StoryTokenizer, config: Config, valid: TokenCache | None, files: str, log: Log
) -> tuple[ValidationScores | None, str]:
    """Returns the scores on all of `files`, else on all of the validation split, and which; else None, and why."""
    whole = replace(config, eval=replace(config.eval, max_batches=0))
    if files:
        with cache_of_files(files, tokenizer) as cache:
            log(f"measuring the loss on {files}: {cache.manifest.num_tokens:,} tokens")
            return validate(params, cache, whole, tokenizer.article_forms), files
    if valid is None:
        return None, (
            f"its validation cache is not in {Path(config.data.cache_dir).absolute()}; run this where the run was "
            "trained, or give --data FILE"
        )
    log(f"measuring the loss on the run's validation split: {valid.manifest.num_tokens:,} tokens")
    of_training = f" (training: eval.max_batches={config.eval.max_batches})" if config.eval.max_batches else ""
    return validate(params, valid, whole, tokenizer.article_forms), f"the run's validation split{of_training}"


def _measure_copies(
    stories: Sequence[Story], tokenizer: StoryTokenizer, train: TokenCache | None, valid: TokenCache | None
) -> dict[str, Any]:
    """Returns `copies` and `real_copies`, those of as many validation stories, found in one pass."""
    if train is None:
        return {}
    written = [tokenizer.encode(story.text) for story in stories]
    prompt_lengths = [len(tokenizer.encode(story.prompt)) for story in stories]
    real = [] if valid is None else _first_stories(valid.tokens, len(stories))
    runs = longest_runs([*written, *real], train.tokens, [*prompt_lengths, *[0] * len(real)])
    of_written, of_real = runs[: len(written)], runs[len(written) :]
    return {"copies": score_copies(of_written), "real_copies": score_copies(of_real) if real else None}


def _first_stories(tokens: np.ndarray, count: int) -> list[list[int]]:
    """Returns the first stories of a cache, without their end tokens."""
    stories: list[list[int]] = [[]]
    for token in tokens:
        if token != END_OF_STORY_ID:
            stories[-1].append(int(token))
        elif len(stories) == count:
            break
        else:
            stories.append([])
    return [story for story in stories if story]


def _score_text(texts: Sequence[str], finished: Sequence[bool] | None, log: Log) -> TextScores:
    """Returns the scores: grammar where the checker is installed, the sentences without a parse where the parser is."""
    log(f"scoring {len(texts):,} stories")
    check_grammar = checker_problem() is None
    return score_stories(texts, finished=finished, check_grammar=check_grammar, parse_sentences=has_parser())


def _judge(stories: Sequence[tuple[str, str]], judge: Judge | None, log: Log) -> JudgeScores | None:
    if judge is None:
        return None
    log(f"sending {len(stories):,} stories to {judge.url}, to be judged by {judge.model}")
    return judge_stories(stories, judge)


def _put_together(
    title: str, measured: Measured, notes: list[str], figures: dict[str, Any], stories: Sequence[Mapping[str, Any]] = ()
) -> Evaluation:
    return Evaluation(
        title=title,
        figures={**figures, **list_figures(measured)},
        scores=list_scores(measured),
        criteria=list_criteria(measured),
        notes=(*notes, *_describe_text(measured.text), *_describe_judge(measured.judge)),
        stories=tuple(stories),
    )


def _describe_writing(writing: Writing, config: Config, *, has_train_cache: bool) -> list[str]:
    notes = [
        f"stories: from {len(read_prompts())} prompts in turn, temperature {writing.temperature:g}, seed "
        f"{writing.seed}, up to {config.data.sequence_length} tokens, as they were written"
        + ", one a prompt at most, since temperature 0 leaves nothing to chance"
        * (writing.temperature == 0)
    ]
    if config.data.source == "sample":
        notes.append("the model was trained on the bundled sample, which this project made up: it is not TinyStories")
    notes.append(
        "copies: their real stories are the run's own validation stories"
        if has_train_cache
        else f"copies: not looked for, no training cache in data.cache_dir={config.data.cache_dir}"
    )
    return notes


def _describe_doubles(texts: Sequence[str]) -> list[str]:
    doubles = len(texts) - len(set(texts))
    if not doubles:
        return []
    return [
        f"{doubles:,} of the {len(texts):,} stories are another's double: with fewer stories than were counted, the "
        "intervals are too narrow"
    ]


def _describe_text(text: TextScores) -> list[str]:
    real, counted, problem = real_scores(), shipped_reference().articles.num_stories, checker_problem()
    checker = " ".join(f"{name} {version}" for name, version in CHECKER.items())
    notes = [
        f"real stories: {real.num_stories} held-out ones of TinyStories",
        f"articles: needed where {counted:,} stories of TinyStories have one with P >= {NEEDED}",
        f"grammar: {f'checked by {checker}' if problem is None else f'unknown, {problem}'}",
    ]
    if text.unparsed_sentences is not None:
        notes.append("sentences without a parse: by this system's link-grammar, part of no score")
    if text.num_stories * text.words_per_story < _COMPARABLE_WORDS:
        notes.append(f"distinct words and pairs: fewer than {_COMPARABLE_WORDS:,} words, so they come out too high")
    return notes


def _describe_judge(judge: JudgeScores | None) -> list[str]:
    if judge is None:
        return []
    ages = ", ".join(f"{group}: {count}" for group, count in judge.age_groups.items()) or "none"
    notes = [f"judge: {judge.num_judged} stories judged, {judge.num_unjudged} not; ages guessed: {ages}"]
    return notes if judge.problem is None else [*notes, f"judge: stopped, {judge.problem}"]
