"""Writes RUN/report.html: how the run went, or how it goes, on one page that needs no network.

    python scripts/report.py runs/top10k

RUN is a folder as train.py's --workdir; it may still be training.
"""

from pathlib import Path

from tinystories_jax import cli


def main(run: str) -> None:
    from tinystories_jax.analysis.report import write_report

    print(write_report(Path(run)))


if __name__ == "__main__":
    cli.run(main, positional="RUN", at_least=1, at_most=1)
