"""Builds what training needs and is missing: the tokenizer and the token caches of both splits; prints the reports.

python scripts/prepare.py --config configs/top10k.py [--config.SECTION.FIELD=VALUE ...] [--rebuild]
"""

from absl import flags
from ml_collections import config_flags

from tinystories_jax import cli
from tinystories_jax.config import resolve
from tinystories_jax.data.prepare import prepare_data
from tinystories_jax.streams import log_to_stderr

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, such as configs/top10k.py.", lock_config=True)
_REBUILD = flags.DEFINE_bool("rebuild", False, "Build again what is there already, for instance a damaged cache.")
flags.mark_flag_as_required("config")


def main() -> None:
    data = prepare_data(resolve(_CONFIG.value), rebuild=_REBUILD.value)
    log_to_stderr(data.report)
    print(f"tokenizer   {data.tokenizer.vocab_size:,} tokens, SHA-256 {data.tokenizer.sha256}")
    for split, cache in (("train", data.train), ("validation", data.valid)):
        manifest = cache.manifest
        print(f"{split:<11} {manifest.num_stories:,} stories, {manifest.num_tokens:,} tokens in {cache.folder}")


if __name__ == "__main__":
    cli.run(main)
