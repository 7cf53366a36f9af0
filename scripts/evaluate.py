"""Scores a model, or any stories, beside held-out real stories, by the recipe's criteria of success.

    python scripts/evaluate.py --checkpoint runs/top10k [--num_stories 200] [--data FILE] [--json OUT]
    python scripts/evaluate.py --stories FILE [--json OUT]

The first writes evaluation.json, evaluation.md and evaluation_stories.jsonl into the run, replacing those of an earlier
score; the second scores text as if a model had written it. FILE is .txt (stories separated by <|endoftext|>), .jsonl or
.parquet. Everything is offline, unless --judge is given.
"""

import os
import sys
from pathlib import Path

from absl import flags

from tinystories_jax import cli
from tinystories_jax.data.files import find_files
from tinystories_jax.errors import UserError

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run (train.py's --workdir).")
_STORIES = flags.DEFINE_string("stories", None, "Instead of --checkpoint: a file of stories to score.")
_STEP = flags.DEFINE_string("step", "best", "Which checkpoint: best, latest, epoch:N, or an update number.")
_NUM_STORIES = flags.DEFINE_integer("num_stories", 200, "Stories to generate, or to read from --stories.", 1, 100_000)
_DATA = flags.DEFINE_string("data", "", "File to measure the loss on, instead of the run's validation split.")
_TEMPERATURE = flags.DEFINE_float(
    "temperature",
    1.0,
    "Of sampling: 1 is the model's own distribution; 0, greedy, gives 44 stories, one a prompt, too few for a verdict.",
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "The same seed gives the same stories on machines of one kind.", lower_bound=0, upper_bound=2**31 - 1
)
_JSON = flags.DEFINE_string("json", "", "File for the figures, beside the run's evaluation.json.")
_JUDGE = flags.DEFINE_string("judge", "", "openai:MODEL sends the stories to OPENAI_BASE_URL, for a model to grade.")


def main() -> None:
    if bool(_CHECKPOINT.value) == bool(_STORIES.value):
        raise UserError("give either --checkpoint=RUN or --stories=FILE, one of them; see --help")
    of_a_model = [flag for flag in (_DATA, _STEP, _TEMPERATURE, _SEED) if flag.present]
    if _STORIES.value and of_a_model:
        raise UserError(
            [
                f"--{flag.name}={flag.value}: needs a model, and --stories has none; leave it out, or give --checkpoint"
                for flag in of_a_model
            ]
        )
    run = Path(_CHECKPOINT.value) if _CHECKPOINT.value else None
    _check_output(_JSON.value, _STORIES.value or _DATA.value, run)
    with cli.importing():
        from tinystories_jax.evaluation.evaluate import Writing, evaluate_file, evaluate_run
        from tinystories_jax.evaluation.judge import read_judge
        from tinystories_jax.evaluation.results import format_text, write_evaluation, write_json
        from tinystories_jax.training.restore import restore_params

    judge = read_judge(_JUDGE.value, os.environ, run and run / "judge.jsonl")
    if run is None:
        evaluation = evaluate_file(_STORIES.value or "", limit=_NUM_STORIES.value, judge=judge)
    else:
        params, meta = restore_params(run, _STEP.value)
        evaluation = evaluate_run(
            params,
            meta.tokenizer,
            meta.config,
            title=f"{run}, checkpoint of update {meta.update:,}",
            update=meta.update,
            fingerprints=(meta.train_fingerprint, meta.valid_fingerprint),
            data_files=_DATA.value,
            writing=Writing(_NUM_STORIES.value, _TEMPERATURE.value, _SEED.value),
            judge=judge,
        )
    # Written before it is shown: what a terminal cannot show is not lost.
    if run is not None:
        instead = ", in place of an earlier score" * (run / "evaluation.json").exists()
        write_evaluation(evaluation, run)
        print(f"wrote {run / 'evaluation.json'}, and beside it .md and the stories{instead}", file=sys.stderr)
    if _JSON.value:
        write_json(evaluation, Path(_JSON.value))
    print(format_text(evaluation))
    asked = evaluation.figures["judge"]
    if asked and asked["refused"]:
        raise UserError(asked["problem"])


def _check_output(output: str, source: str, run: Path | None) -> None:
    """Raises `UserError` now, and not after minutes, where the figures could not be written or would be read again."""
    if output and not Path(output).parent.is_dir():
        raise UserError(f"--json={output}: the folder {Path(output).parent} does not exist; make it, or name another")
    if output and run and Path(output).exists() and Path(output).resolve().is_relative_to(run.resolve()):
        raise UserError(f"--json={output} is a file of the run; name another one, outside of it")
    if output and source and Path(output).is_file() and any(Path(output).samefile(path) for path in find_files(source)):
        raise UserError(f"--json={output} is the file that is read; name another one")


if __name__ == "__main__":
    cli.run(main, compiles=True)
