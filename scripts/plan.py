"""Prints what a config is going to cost: parameters, memory, disk, updates, FLOPs, minutes here (measured) and on GPUs.
It prepares no data and changes no run.

    python scripts/plan.py --config configs/top10k.py [--config.SECTION.FIELD=VALUE ...]
        [--json] [--mfu=0.3] [--nomeasure]
"""

import dataclasses
import json

from absl import flags
from ml_collections import config_flags

from tinystories_jax import cli
from tinystories_jax.config import resolve
from tinystories_jax.streams import log_to_stderr

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, such as configs/top10k.py.", lock_config=True)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object with all figures.")
_MFU = flags.DEFINE_float(
    "mfu", None, "Share of its peak that each GPU reaches; without it the one measured, or assumed."
)
_MEASURE = flags.DEFINE_bool("measure", True, "Compile and time a few training steps on this device, about a minute.")
flags.mark_flag_as_required("config")


def main() -> None:
    config = resolve(_CONFIG.value)
    # Imported once the config is known to be sound: JAX takes seconds to start.
    from tinystories_jax.analysis.plan import make_plan
    from tinystories_jax.analysis.plan_table import format_plan

    plan = make_plan(config, mfu=_MFU.value, measure=_MEASURE.value, log=log_to_stderr)
    print(json.dumps(dataclasses.asdict(plan), indent=1, allow_nan=False) if _JSON.value else format_plan(plan))


if __name__ == "__main__":
    cli.run(main)
