"""Stories written by a model, from prompts in plain text; nothing touches the text afterwards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
from tokenizers.decoders import DecodeStream

from tinystories_jax.config import Config
from tinystories_jax.data.tokenizer import END_OF_STORY_ID, StoryTokenizer
from tinystories_jax.errors import UserError
from tinystories_jax.model.generate import Sampling, generate, generate_chunks
from tinystories_jax.model.transformer import Params

_MOST_ROWS = 64  # in one batch: bounds the KV cache however many stories are asked for
_STREAM_CHUNK = 8  # tokens between two looks at the device: as smooth as reading, and few round trips


@dataclass(frozen=True)
class Story:
    """`text` begins with `prompt`; `finished` says that the model ended it, rather than a limit on its length."""

    prompt: str
    text: str
    finished: bool


def write_stories(
    params: Params,
    tokenizer: StoryTokenizer,
    config: Config,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    seed: int,
    max_new_tokens: int,
) -> list[Story]:
    """Returns one story per prompt; the same arguments give the same stories."""
    prompt_ids = [_encode(tokenizer, prompt) for prompt in prompts]
    texts: list[list[int]] = []
    for start in range(0, len(prompt_ids), _MOST_ROWS):
        texts += generate(
            params,
            prompt_ids[start : start + _MOST_ROWS],
            config.model,
            sampling,
            key=jax.random.key(seed),
            end_token=END_OF_STORY_ID,
            context_length=config.data.sequence_length,
            max_new_tokens=max_new_tokens,
            first_row=start,
            num_rows=len(prompt_ids),
        )
    return [
        _whole_story(tokenizer, prompt, len(prompt_id), text)
        for prompt, prompt_id, text in zip(prompts, prompt_ids, texts, strict=True)
    ]


def stream_story(
    params: Params,
    tokenizer: StoryTokenizer,
    config: Config,
    prompt: str,
    sampling: Sampling,
    *,
    seed: int,
    max_new_tokens: int,
    row: int = 0,
    num_rows: int = 1,
) -> Iterator[Story]:
    """Yields story number `row` of the `num_rows` of `write_stories` as it grows; the last is the whole."""
    tokens = _encode(tokenizer, prompt)
    prompt_length, text = len(tokens), prompt
    pieces = DecodeStream(skip_special_tokens=True)
    for (longer,) in generate_chunks(
        params,
        [tokens],
        config.model,
        sampling,
        key=jax.random.key(seed),
        end_token=END_OF_STORY_ID,
        context_length=config.data.sequence_length,
        max_new_tokens=max_new_tokens,
        chunk_size=_STREAM_CHUNK,
        first_row=row,
        num_rows=num_rows,
    ):
        # A piece comes when its bytes are whole characters.
        text += "".join(pieces.step(tokenizer.backend, token) or "" for token in longer[len(tokens) :])
        tokens = longer
        yield Story(prompt, text, finished=False)
    # A limit on the length can leave half a character behind.
    yield _whole_story(tokenizer, prompt, prompt_length, tokens)


def check_prompts(tokenizer: StoryTokenizer, prompts: Sequence[str], context_length: int) -> None:
    """Raises one `UserError` for all prompts that leave no room for a story in `context_length` tokens."""
    lengths = [(prompt, len(_encode(tokenizer, prompt))) for prompt in prompts]
    problems = [
        f"the prompt {prompt[:40]!r} has {length} tokens with the end token before it; it must have fewer than the "
        f"model's context of {context_length}, so that there is room to write"
        for prompt, length in lengths
        if length >= context_length
    ]
    if problems:
        raise UserError(problems)


def _whole_story(tokenizer: StoryTokenizer, prompt: str, prompt_length: int, tokens: list[int]) -> Story:
    finished = len(tokens) > prompt_length and tokens[-1] == END_OF_STORY_ID
    return Story(prompt, _text(tokenizer, tokens), finished)


def _text(tokenizer: StoryTokenizer, tokens: list[int]) -> str:
    """Returns the text between the end token that `_encode` puts first and the one that may stand last."""
    end = len(tokens) - (len(tokens) > 1 and tokens[-1] == END_OF_STORY_ID)
    return tokenizer.decode(tokens[1:end])


def _encode(tokenizer: StoryTokenizer, prompt: str) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the prompt {prompt!r} is not UTF-8 text; mend its bytes or the terminal's encoding"
        ) from error
    # A story stands after the previous one's end token wherever the model has seen one begin.
    return [END_OF_STORY_ID, *tokenizer.encode(prompt)]
