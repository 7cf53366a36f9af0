"""Trains a model, or goes on with a run: tokenizer, token cache and training, whatever is missing.

    python scripts/train.py --config configs/top10k.py [--workdir runs/top10k] [--config.SECTION.FIELD=VALUE ...]

The config file says what each field means. Before the first update of a run the doctor's fast checks look for faults
that would train without an error.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from tinystories_jax import cli
from tinystories_jax.config import Config, resolve
from tinystories_jax.data.prepare import prepare_data
from tinystories_jax.lock import sole_trainer
from tinystories_jax.streams import log_to_stderr
from tinystories_jax.training.run_folder import require_own_files

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, such as configs/top10k.py.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; runs/NAME_OF_THE_CONFIG when empty.")
_DOCTOR = flags.DEFINE_bool("doctor", True, "Make the doctor's fast checks first; refuse to start if one fails.")
flags.mark_flag_as_required("config")


def main() -> int:
    config = resolve(_CONFIG.value)
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = Path(_WORKDIR.value or f"runs/{name}")
    require_own_files(workdir)
    # Before anything is written there, and until the report stands.
    with sole_trainer(workdir):
        if (workdir / "checkpoints").exists():
            # Before hours of preparing data. JAX is imported, which a new run need not wait for.
            with cli.importing():
                from tinystories_jax.training.restore import require_same_config

            require_same_config(workdir, config)
        return _train(config, workdir)


def _train(config: Config, workdir: Path) -> int:
    data = prepare_data(config)
    if not (workdir / "checkpoints").exists():
        log_to_stderr(data.report)
    # Imported once config and data are known to be sound: JAX takes seconds to start.
    with cli.importing():
        from tinystories_jax.training.loop import train
        from tinystories_jax.training.restore import has_checkpoint

    if _DOCTOR.value and not has_checkpoint(workdir):
        with cli.importing():
            from tinystories_jax.analysis.doctor import require_health

        require_health(config, data, workdir)
    result = train(config, data, workdir)
    print(result.summary())
    # A rerun that had nothing to do leaves the run as it was.
    if result.updates_done or not _has_report(workdir):
        _report(workdir)
    return 128 + result.signal if result.signal else 0


def _has_report(workdir: Path) -> bool:
    """Says whether the report is newer than every checkpoint; a process may have been killed before writing it."""
    report = workdir / "report.html"
    saved = [path.stat().st_mtime_ns for path in (workdir / "checkpoints").iterdir()]
    return report.exists() and report.stat().st_mtime_ns > max(saved, default=0)


def _report(workdir: Path) -> None:
    try:
        from tinystories_jax.analysis.report import write_report

        print(f"report: {write_report(workdir)}")
    except Exception as error:  # whatever it is: the training is done and saved, and its exit code says so
        reason = " ".join(str(error).split())
        print(f"warning: no report was written ({type(error).__name__}: {reason})", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, compiles=True)
