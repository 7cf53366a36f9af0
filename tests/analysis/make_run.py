"""Writes the folder of a run without training, through the writers that training uses."""

import contextlib
import json
import math
import random
from pathlib import Path
from typing import Any

from tests.tiny import read_tiny_values
from tinystories_jax.config import resolve, to_dict, with_data
from tinystories_jax.training.jsonl import JsonLines
from tinystories_jax.training.meta import History
from tinystories_jax.training.metrics import MetricsLog

PROMPTS = ("Once upon a time", "Tom had")
NUM_UPDATES, EVAL_EVERY = 20, 5
BYTES_PER_TOKEN = 4.0
Measured = tuple[float, float, float]


def make_run(
    folder: Path,
    *,
    seed: int = 0,
    loss: float = 2.0,
    tokenizer: str = "one",
    num_updates: int = NUM_UPDATES,
    seconds: bool = True,
    text: str = "Once upon a time there was a cat and the dog.",
    **fields: Any,
) -> Path:
    """Makes a run of `num_updates` updates that ends at a validation loss of `loss`; `section__key` is a field."""
    values = read_tiny_values()
    values.seed = seed
    values.sample.prompts = PROMPTS
    for field, value in fields.items():
        section, key = field.split("__")
        values[section][key] = value
    config = with_data(resolve(values), vocab_size=61, num_blocks=40)
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps({"name": tokenizer}))
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    rng = random.Random(seed)
    samples = JsonLines(folder / "samples.jsonl", None, updates=(), once=False)
    with (
        contextlib.closing(samples),
        MetricsLog(folder, history=History(), state=None, update=0, tensorboard=False) as log,
    ):
        for update in range(1, num_updates + 1):
            log.write([_make_row(update, loss, rng, seconds=seconds)])
            if update % EVAL_EVERY == 0:
                rows = [{"update": update, "prompt": p, "text": p + text[16:], "finished": False} for p in PROMPTS]
                samples.write(rows)
    return folder


def _make_row(update: int, loss: float, rng: random.Random, *, seconds: bool) -> dict[str, Any]:
    now = loss + 4.0 / update - 4.0 / NUM_UPDATES
    row: dict[str, Any] = {
        "update": update,
        "epoch": update / 5,
        "tokens": update * 128,
        "train/loss": now + rng.uniform(-0.1, 0.1),
        "train/grad_norm": 2.0 / update,
        "train/learning_rate": 1e-3 * update / NUM_UPDATES,
    }
    if seconds:
        row["seconds"] = 3.0 * update
        row |= {"train/tokens_per_second": 1000.0 + update, "train/mfu": None, "train/data_wait_fraction": 0.01}
    if update % EVAL_EVERY == 0:
        row |= {
            "valid/loss": now,
            "valid/bits_per_byte": now / (math.log(2) * BYTES_PER_TOKEN),
            "valid/article_loss": now / 2,
            "valid/article_recall": min(0.5 + update / 100, 0.99),
            "samples/articles": min(0.6 + update / 100, 0.99),
            "samples/grammar": min(4.0 + update / 10, 9.9),
        }
    return row


def write_evaluation(
    folder: Path,
    *,
    articles: tuple[float, float, float],
    grammar: tuple[float, float, float],
    temperature: float | None = 1.0,
) -> None:
    """Writes an evaluation.json; each figure is a value and its interval."""
    score = {"name": "grammar", "unit": "of 10", "value": grammar[0], "interval": grammar[1:]}
    values = {
        "checkpoint_update": NUM_UPDATES,
        "num_stories": 200,
        "temperature": temperature,
        "scores": [{**score, "real": 9.25, "real_interval": [9.1, 9.4]}],
        "criteria": [
            {"name": "validation loss < 2.0", "passed": False, "figure": "2.768"},
            {"name": "grammar at least 8", "passed": True, "figure": "8.5"},
        ],
        "grammar": grammar[0],
        "grammar_interval": grammar[1:],
        "articles": articles[0],
        "articles_interval": articles[1:],
    }
    (folder / "evaluation.json").write_text(json.dumps(values))
