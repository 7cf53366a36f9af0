"""Puts runs side by side and says which differences are larger than the noise; runs that differ in their seed alone
are one side, and show how large the noise is.

    python scripts/compare.py runs/top10k runs/baseline32k [RUN ...] [--output=compare]

RUN is a folder as train.py's --workdir. Prints the figures and writes compare.md and compare.html, with plots and
stories.
"""

from pathlib import Path

from absl import flags

from tinystories_jax import cli

_OUTPUT = flags.DEFINE_string("output", "compare", "Folder for compare.md and compare.html.")


def main(*runs: str) -> None:
    from tinystories_jax.analysis.compare import compare
    from tinystories_jax.analysis.compare_output import to_markdown, to_text, write_comparison_page

    comparison = compare([Path(run) for run in runs])
    folder = Path(_OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.md").write_text(to_markdown(comparison), encoding="utf-8", errors="replace")
    page = write_comparison_page(comparison, folder / "compare.html")
    # After writing: what a terminal cannot show is not lost.
    print(to_text(comparison))
    print(f"\nwritten: {folder / 'compare.md'}, {page}")


if __name__ == "__main__":
    cli.run(main, positional="RUN", at_least=2, at_most=None)
