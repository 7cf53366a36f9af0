"""Measures how far the scores of written text can be trusted: on real stories, and on the same stories spoiled.

    python scripts/calibrate.py --train_files=train.txt --valid_files=valid.txt [--output=FILE.json.gz]

Articles are counted on the training files. Every other story of the validation files says how many faults real stories
have; the others are scored and spoiled. --output writes the counts as the reference of all scores.
"""

from pathlib import Path

from absl import flags

from tinystories_jax import cli

_TRAIN_FILES = flags.DEFINE_string("train_files", None, "Comma-separated paths or globs.", required=True)
_VALID_FILES = flags.DEFINE_string("valid_files", None, "Likewise; stories that are not in those.", required=True)
_OUTPUT = flags.DEFINE_string("output", "", "File for the reference, .json.gz; nothing is written when empty.")


def main() -> None:
    from tinystories_jax.evaluation.calibration import (
        format_table,
        halve,
        make_reference,
        read_stories,
        score_spoiled,
    )
    from tinystories_jax.evaluation.grammar import score_stories, write_reference

    train, train_source = read_stories(_TRAIN_FILES.value)
    valid, valid_source = read_stories(_VALID_FILES.value)
    measured, scored = halve(valid)
    reference = make_reference(train, measured, {"counted": train_source, "held_out": valid_source})
    real = score_stories(scored, finished=[True] * len(scored), reference=reference)
    if _OUTPUT.value:
        write_reference(reference, real, Path(_OUTPUT.value))
        print(f"wrote {_OUTPUT.value}")
    print(f"real stories have {reference.real_faults_per_100_words:.3f} faults per 100 words")
    print(format_table(real, score_spoiled(scored, reference)))


if __name__ == "__main__":
    cli.run(main)
