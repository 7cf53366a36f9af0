"""Writes stories with a trained model; the stories, prompts included, are all that stands on standard output; a line
<|endoftext|> stands between two of them, as in the data set's own files.

    python scripts/sample.py --checkpoint runs/top10k --prompt="Once upon a time there was" --num_samples=3
"""

import sys
from pathlib import Path

from absl import flags

from tinystories_jax import cli

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run (train.py's --workdir).", required=True)
_STEP = flags.DEFINE_string("step", "best", "Which checkpoint: best, latest, epoch:N, or an update number.")
_PROMPT = flags.DEFINE_multi_string(
    "prompt", ["Once upon a time there was"], "Beginning of a story, which may be empty."
)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Stories for each prompt.", lower_bound=1, upper_bound=10_000)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 0, "Tokens after the prompt; 0: up to the model's context.", lower_bound=0
)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Divides the logits, 0 to 100; 0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw among the k likeliest tokens; 0 is off.", upper_bound=2**31 - 1)
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Draw among the likeliest tokens of this total probability, above 0; 1 is off."
)
_REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", 1.0, "Penalty on tokens already in the text, 0.1 to 10; 1 is off."
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "The same seed writes the same stories, by the same command.", lower_bound=0, upper_bound=2**31 - 1
)
_STREAM = flags.DEFINE_bool("stream", False, "Show each story while it is generated.")


def main() -> None:
    with cli.importing():
        from tinystories_jax.data.stories import END_OF_STORY
        from tinystories_jax.evaluation.samples import check_prompts, stream_story, write_stories
        from tinystories_jax.model.generate import Sampling
        from tinystories_jax.training.restore import restore_params

    sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _REPETITION_PENALTY.value)
    params, meta = restore_params(Path(_CHECKPOINT.value), _STEP.value)
    context_length = meta.config.data.sequence_length
    check_prompts(meta.tokenizer, _PROMPT.value, context_length)
    max_new_tokens = min(_MAX_NEW_TOKENS.value or context_length, context_length)
    limits = {"seed": _SEED.value, "max_new_tokens": max_new_tokens}
    prompts = [prompt for prompt in _PROMPT.value for _ in range(_NUM_SAMPLES.value)]
    separator = f"\n{END_OF_STORY}\n"
    made_up = " (trained on the made-up sample, not TinyStories)" * (meta.config.data.source == "sample")
    print(f"checkpoint of update {meta.update} in {_CHECKPOINT.value}{made_up}", file=sys.stderr)
    if _MAX_NEW_TOKENS.value >= context_length:
        cut = f"cut to what the model's context of {context_length} has room for"
        print(f"--max_new_tokens={_MAX_NEW_TOKENS.value} is {cut}", file=sys.stderr)
    if _STREAM.value:
        stories = []
        for row, prompt in enumerate(prompts):
            print(separator * bool(row) + prompt, end="", flush=True)
            shown = len(prompt)
            place = {"row": row, "num_rows": len(prompts)}
            for story in stream_story(params, meta.tokenizer, meta.config, prompt, sampling, **place, **limits):
                print(story.text[shown:], end="", flush=True)
                shown = len(story.text)
            stories.append(story)
        print()
    else:
        stories = write_stories(params, meta.tokenizer, meta.config, prompts, sampling, **limits)
        print(separator.join(story.text for story in stories))
    if unfinished := sum(not story.finished for story in stories):
        print(f"{unfinished} of {len(stories)} stories reached the limit on their length", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, compiles=True)
