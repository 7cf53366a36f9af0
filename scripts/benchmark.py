"""Measures this machine with the real code: training, generation, data, the start of a run, and growth.

    python scripts/benchmark.py [train|decode|data|start|growth|all] [--config=configs/top10k.py]
        [--config.SECTION.FIELD=VALUE ...] [--peer] [--rounds=3] [--trace=FOLDER] [--json=FILE]

MODE is all when left out. It needs no prepared data and changes no run; --peer times PyTorch as well. On a CPU a
micro-batch that would take too long is made smaller; the table gives its rows. docs/benchmarks.md explains each figure.
"""

import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from tinystories_jax import cli
from tinystories_jax.config import resolve
from tinystories_jax.streams import log_to_stderr

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    str(Path(__file__).parents[1] / "configs" / "top10k.py"),
    "Config file; its shapes are what is measured.",
    lock_config=True,
)
_PEER = flags.DEFINE_bool("peer", False, "With train and decode: interleave Hugging Face's Llama in PyTorch.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "How often sides are interleaved, and starts repeated.", lower_bound=1)
_TRACE = flags.DEFINE_string("trace", "", "With train: folder for a profile of one update, for XProf or Perfetto.")
_JSON = flags.DEFINE_string("json", "", "File for all figures, written anew after each section.")


def main(mode: str = "all") -> None:
    config = resolve(_CONFIG.value)
    output = Path(_JSON.value) if _JSON.value else None
    if output:
        output.touch()  # a place that cannot be written is told now, and not in half an hour
    # Imported once the config is known to be sound: JAX takes seconds to start.
    from tinystories_jax.analysis.benchmark.run import run_benchmark
    from tinystories_jax.analysis.benchmark.table import format_section

    sections = run_benchmark(
        config, mode, rounds=_ROUNDS.value, peer=_PEER.value, trace=_TRACE.value, log=log_to_stderr
    )
    for figures in sections:
        print(format_section(figures), flush=True)
        if output:
            output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(main, positional="MODE", at_most=1)
