"""Measures, on your own config, data and checkpoint, the faults that train without an error; changes no run.

    python scripts/doctor.py --config configs/top10k.py [--workdir runs/top10k] [--checkpoint runs/top10k] [--json]

Exit code 0 when no check fails, 2 otherwise. train.py makes the fast ones of these checks before its first update.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from tinystories_jax import cli
from tinystories_jax.config import resolve

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, such as configs/top10k.py.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder the run will have; runs/NAME_OF_THE_CONFIG when empty.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "A run whose best checkpoint is to be checked as well.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of the table.")
_VERBOSE = flags.DEFINE_bool("verbose", False, "Show samples and intermediate figures below each check.")
flags.mark_flag_as_required("config")


def main() -> int:
    config = resolve(_CONFIG.value)
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    # Imported once the config is known to be sound: JAX takes seconds to start.
    with cli.importing():
        from tinystories_jax.analysis.check import Outcome, to_json
        from tinystories_jax.analysis.doctor import examine

    out = sys.stderr if _JSON.value else sys.stdout
    checks = examine(
        config,
        workdir=Path(_WORKDIR.value or f"runs/{name}"),
        checkpoint=Path(_CHECKPOINT.value) if _CHECKPOINT.value else None,
        verbose=_VERBOSE.value,
        show=lambda line: print(line, file=out, flush=True),
    )
    if _JSON.value:
        print(to_json(checks))
    return 2 if any(check.outcome == Outcome.FAIL for check in checks) else 0


if __name__ == "__main__":
    cli.run(main, compiles=True)
