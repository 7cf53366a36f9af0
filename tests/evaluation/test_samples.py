"""Stories from prompts in plain text: nothing added, nothing cut."""

import dataclasses
import itertools

import jax
import pytest

from tests.tiny import make_tiny_config
from tinystories_jax.config import Config
from tinystories_jax.data.tokenizer import StoryTokenizer, train_bpe
from tinystories_jax.errors import UserError
from tinystories_jax.evaluation.samples import check_prompts, stream_story, write_stories
from tinystories_jax.model.generate import Sampling
from tinystories_jax.model.transformer import init_params

PROMPTS = ["Once upon", "The café 🙂", ""]


@pytest.fixture(scope="module")
def tokenizer() -> StoryTokenizer:
    return train_bpe(["Once upon a time there was a cat.", "The cat sat on the mat."], vocab_size=280)


@pytest.fixture(scope="module")
def config(tokenizer) -> Config:
    config = make_tiny_config()
    model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, sequence_length=48))


@pytest.fixture(scope="module")
def params(config):
    return jax.tree.map(lambda leaf: leaf * 3, init_params(config.model, jax.random.key(0)))


def test_stories_begin_with_their_prompts_and_repeat_with_the_seed(params, tokenizer, config):
    stories = write_stories(params, tokenizer, config, PROMPTS, Sampling(), seed=1, max_new_tokens=20)
    assert [story.prompt for story in stories] == PROMPTS
    assert all(story.text.startswith(story.prompt) for story in stories)
    assert any(len(story.text) > len(story.prompt) for story in stories)
    assert stories == write_stories(params, tokenizer, config, PROMPTS, Sampling(), seed=1, max_new_tokens=20)
    assert stories != write_stories(params, tokenizer, config, PROMPTS, Sampling(), seed=2, max_new_tokens=20)


def test_streaming_writes_the_same_stories(params, tokenizer, config):
    # Random bytes: pieces are half characters most of the time, and must not be printed as such.
    stories = write_stories(params, tokenizer, config, PROMPTS, Sampling(), seed=3, max_new_tokens=21)
    for row, story in enumerate(stories):
        grown = list(
            stream_story(params, tokenizer, config, story.prompt, Sampling(), seed=3, max_new_tokens=21, row=row)
        )
        assert grown[-1] == story
        texts = [story.prompt, *(part.text for part in grown)]
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


def test_a_finished_story_has_no_end_marker_in_its_text(params, tokenizer, config):
    # The hidden state is normalised, so a large embedding row for the end token wins against all others.
    embedding_VD = params["embed_tokens"]["embedding"]
    biased = params | {"embed_tokens": {"embedding": embedding_VD.at[1:].multiply(1e-6)}}
    (story,) = write_stories(biased, tokenizer, config, ["a cat"], Sampling(temperature=0.0), seed=0, max_new_tokens=40)
    assert story.finished
    assert "<|endoftext|>" not in story.text
    assert story.text.startswith("a cat")
    unbiased = params | {"embed_tokens": {"embedding": embedding_VD.at[0].multiply(1e-6)}}
    (story,) = write_stories(
        unbiased, tokenizer, config, ["a cat"], Sampling(temperature=0.0), seed=0, max_new_tokens=5
    )
    assert not story.finished


def test_prompts_that_fill_the_context_are_refused_all_at_once(tokenizer, config):
    check_prompts(tokenizer, PROMPTS, 48)
    with pytest.raises(UserError) as caught:
        check_prompts(tokenizer, ["fine", "x" * 100, "y" * 100], config.data.sequence_length)
    assert len(caught.value.problems) == 2
