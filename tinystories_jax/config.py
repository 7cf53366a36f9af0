"""From a ConfigDict to frozen dataclasses: the only validation and the only derivation of values.

`resolve` checks what the config alone can tell; `with_data` adds what only the data can tell (the vocabulary reached,
the blocks of the training split, hence the schedule). Nothing else in the project computes a schedule or a default.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from tinystories_jax.errors import UserError

# Filled in here, never read from a config.
_DERIVED = {"derived": True}
# May differ between a run and its continuation: it changes neither the model nor what it is trained on.
_FREE = {"free": True}


@dataclass(frozen=True)
class DataConfig:
    source: str = field(metadata=_FREE)  # the cache's fingerprint, not the way to the stories, decides on resuming
    hub_name: str = field(metadata=_FREE)
    hub_revision: str = field(metadata=_FREE)
    train_files: str = field(metadata=_FREE)
    valid_files: str = field(metadata=_FREE)
    max_stories: int
    cache_dir: str = field(metadata=_FREE)
    sequence_length: int


@dataclass(frozen=True)
class TokenizerConfig:
    path: str = field(metadata=_FREE)  # likewise: the tokenizer's SHA-256 decides
    vocab_size: int
    max_samples: int
    source: str
    hub_name: str
    hub_subset: str
    hub_revision: str
    train_files: str = field(metadata=_FREE)


@dataclass(frozen=True)
class ModelConfig:
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    d_ff: int
    rope_theta: float
    tie_embeddings: bool
    dropout: float
    dtype: str
    remat: bool = field(metadata=_FREE)
    head_dim: int = field(metadata=_DERIVED)
    vocab_size: int = field(metadata=_DERIVED)


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int
    grad_accum_steps: int
    num_epochs: int
    max_updates: int
    article_loss_weight: float


@dataclass(frozen=True)
class OptimConfig:
    learning_rate: float
    min_learning_rate: float
    warmup_updates: int
    weight_decay: float
    beta1: float
    beta2: float
    max_grad_norm: float
    muon_learning_rate: float
    muon_momentum: float


@dataclass(frozen=True)
class EvalConfig:
    every: int
    max_batches: int
    early_stopping_patience: int


@dataclass(frozen=True)
class CheckpointConfig:
    every: int
    keep: int


@dataclass(frozen=True)
class SampleConfig:
    prompts: tuple[str, ...]
    max_new_tokens: int
    temperature: float


@dataclass(frozen=True)
class LoggingConfig:
    every: int
    loss_spike_factor: float
    tensorboard: bool


@dataclass(frozen=True)
class Schedule:
    """What the training split decides: counts of blocks and updates.

    Blocks are dealt out as one endless row of shuffled epochs, so an epoch need not end on an update boundary:
    `epoch_ends[e - 1]` is the first update after which every block has been visited `e` times; it is empty where an
    update visits more than one epoch, which gives epochs no end of their own.
    """

    num_blocks: int
    blocks_per_update: int
    total_updates: int
    warmup_updates: int
    epoch_ends: tuple[int, ...]

    def epoch_at(self, update: int) -> float:
        """Epochs seen after `update` updates, as a fraction."""
        return update * self.blocks_per_update / self.num_blocks


_FREE_SECTIONS = {"eval", "checkpoint", "sample", "logging"}


@dataclass(frozen=True)
class Config:
    """A resolved config. `schedule` is None, and `model.vocab_size` 0, until `with_data` has seen the data."""

    seed: int
    data: DataConfig
    tokenizer: TokenizerConfig
    model: ModelConfig
    train: TrainConfig
    optim: OptimConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    sample: SampleConfig
    logging: LoggingConfig
    schedule: Schedule | None = field(default=None, metadata=_DERIVED)


_SECTIONS = {name: hint for name, hint in get_type_hints(Config).items() if name not in ("seed", "schedule")}


def resolve(values: Mapping[str, Any]) -> Config:
    """Returns the frozen config; raises one `UserError` with every problem found in `values` (a ConfigDict or dict)."""
    problems: list[str] = []
    if not hasattr(values, "items"):
        raise UserError(f"the config is a {type(values).__name__}; get_config must return a ConfigDict of sections")
    for name in values:
        if name != "seed" and name not in _SECTIONS:
            problems.append(f"{name}: no such section; the sections are {', '.join(_SECTIONS)}")
    seed: Any = None
    if "seed" in values:
        seed = _typed("seed", values["seed"], int, problems)
    else:
        problems.append("seed is missing; add config.seed = 0")
    sections: dict[str, dict[str, Any]] = {}
    for name, section_type in _SECTIONS.items():
        given: Any = values.get(name)
        present = dict(given.items()) if hasattr(given, "items") else {}
        if given is not None and not hasattr(given, "items"):
            problems.append(f"section {name}={_show(given)} must be a ConfigDict; see configs/top10k.py")
        elif not present:
            problems.append(f"section {name} is missing; see configs/top10k.py")
        sections[name] = _read_section(name, section_type, present, problems)
    problems += _check_values(seed, sections)
    if problems:
        raise UserError(problems)
    model = sections["model"]
    model["num_kv_heads"] = model["num_kv_heads"] or model["num_heads"]
    model["head_dim"] = model["d_model"] // model["num_heads"]
    model["vocab_size"] = 0
    built = {name: section_type(**sections[name]) for name, section_type in _SECTIONS.items()}
    return Config(seed=seed, **built)


def with_data(config: Config, *, vocab_size: int, num_blocks: int) -> Config:
    """Returns `config` with the tokenizer's vocabulary size and the schedule that the training blocks give."""
    if num_blocks < 1:
        raise UserError(
            f"the training split is shorter than one block of data.sequence_length={config.data.sequence_length} + 1 "
            "tokens; give more stories or a shorter --config.data.sequence_length"
        )
    train = config.train
    blocks_per_update = train.batch_size * train.grad_accum_steps
    total_updates = train.max_updates or -(-train.num_epochs * num_blocks // blocks_per_update)
    if total_updates > _MAX_UPDATES:
        raise UserError(
            f"train.num_epochs={train.num_epochs:,} epochs are {total_updates:,} updates, more than {_MAX_UPDATES:,}; "
            "give fewer epochs, or larger updates"
        )
    num_epochs = total_updates * blocks_per_update // num_blocks
    if num_epochs > _MAX_EPOCHS:
        name = "max_updates" if train.max_updates else "num_epochs"
        raise UserError(
            f"train.{name}={getattr(train, name):,}: {total_updates:,} updates of {blocks_per_update:,} blocks "
            f"(train.batch_size times train.grad_accum_steps) are {num_epochs:,} epochs of {num_blocks:,} blocks, more "
            f"than {_MAX_EPOCHS:,}; give more stories or a lower --config.train.{name}"
        )
    epoch_ends = tuple(-(-epoch * num_blocks // blocks_per_update) for epoch in range(1, num_epochs + 1))
    schedule = Schedule(
        num_blocks=num_blocks,
        blocks_per_update=blocks_per_update,
        total_updates=total_updates,
        # A run cut short by max_updates still warms up and still decays.
        warmup_updates=min(config.optim.warmup_updates, total_updates // 2),
        epoch_ends=epoch_ends if blocks_per_update <= num_blocks else (),
    )
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    return dataclasses.replace(config, model=model, schedule=schedule)


_UNKNOWN_UPDATES_PER_EPOCH = 1_000  # stands in for what the data alone can tell


def with_unknown_data(config: Config, *, vocab_size: int) -> Config:
    """Returns `config` as long as nobody knows its data: with a vocabulary of that size, and with a schedule in which
    `train.max_updates` are one epoch, or an epoch is 1,000 updates where that is not set. Refuses no config."""
    updates_per_epoch = config.train.max_updates or _UNKNOWN_UPDATES_PER_EPOCH
    blocks_per_update = config.train.batch_size * config.train.grad_accum_steps
    return with_data(config, vocab_size=vocab_size, num_blocks=updates_per_epoch * blocks_per_update)


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as JSON-able nested dicts, derived values included."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
    """Returns the config that `to_dict` wrote, validated again; raises `UserError` when it is not one."""
    try:
        given = {name: value for name, value in values.items() if name != "schedule"}
        given["model"] = {key: v for key, v in given["model"].items() if key not in _derived_fields(ModelConfig)}
    except (AttributeError, KeyError) as error:
        raise UserError(f"the stored config is not one ({error!r})") from error
    config = resolve(given)
    try:
        stored = dict(values["schedule"])
        schedule = Schedule(**{**stored, "epoch_ends": tuple(stored["epoch_ends"])})
        vocab_size = values["model"]["vocab_size"]
        for count in (*dataclasses.astuple(schedule)[:-1], *schedule.epoch_ends, vocab_size):
            if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < _MAX_INTEGER:
                raise ValueError(f"{count!r:.50} is no count")
        if not (schedule.num_blocks and schedule.blocks_per_update and schedule.total_updates and vocab_size):
            raise ValueError("a count is 0")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the stored config has no usable schedule or vocabulary size ({error!r})") from error
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=vocab_size), schedule=schedule
    )


def contradictions(of_run: Config, requested: Config) -> list[str]:
    """Returns one line per field in which `requested` would not continue the run that `of_run` describes.

    Derived values are named only where no field that a user sets differs: then the data or the code are others.
    """
    found = differences(of_run, requested)
    # Which checkpoint is best and when patience ends follow from losses that compare on the same tokens alone.
    batches = of_run.eval.max_batches, requested.eval.max_batches
    if batches[0] != batches[1]:
        found.append(("eval.max_batches", *batches))
    found = [item for item in found if not _is_derived(item[0])] or found
    return [f"{name}: the run has {_brief(before)}, requested {_brief(now)}" for name, before, now in found]


def follows_from_the_data(contradiction: str) -> bool:
    """Returns whether a line of `contradictions` is about a derived value."""
    return _is_derived(contradiction.partition(":")[0])


def _brief(value: Any) -> str:
    text = str(value)  # the ends of epochs may be many
    return text if len(text) <= 100 else f"{text[:97]}..."


def differences(first: Config, second: Config) -> list[tuple[str, Any, Any]]:
    """Returns the fields that change the model or what it is trained on, with the two values where they differ."""
    found = [] if first.seed == second.seed else [("seed", first.seed, second.seed)]
    for name, section_type in (*_SECTIONS.items(), ("schedule", Schedule)):
        if name in _FREE_SECTIONS:
            continue
        for item in dataclasses.fields(section_type):
            before, now = getattr(getattr(first, name), item.name), getattr(getattr(second, name), item.name)
            if not item.metadata.get("free") and before != now:
                found.append((f"{name}.{item.name}", before, now))
    return found


def _read_section(name: str, section_type: type, values: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Returns the section's values by name, None where one is missing or of the wrong type, and notes the problems."""
    hints = get_type_hints(section_type)
    for derived in _derived_fields(section_type):
        del hints[derived]
    typed: dict[str, Any] = dict.fromkeys(hints)
    for key, hint in hints.items():
        if key in values:
            typed[key] = _typed(f"{name}.{key}", values[key], hint, problems)
        elif values:
            problems.append(f"{name}.{key} is missing; see configs/top10k.py for its meaning and a value")
    problems += [
        f"{name}.{key}: nothing reads this field; remove it or mend its name" for key in values if key not in hints
    ]
    return typed


def _is_derived(name: str) -> bool:
    section, _, field = name.partition(".")
    return section == "schedule" or (section in _SECTIONS and field in _derived_fields(_SECTIONS[section]))


def _derived_fields(section_type: type) -> list[str]:
    return [item.name for item in dataclasses.fields(section_type) if item.metadata.get("derived")]


_MAX_INTEGER = 2**53  # a larger one is not a float any more, nor would JSON give it back everywhere
_WANTED = {
    bool: "bool",
    int: "int",
    float: "a finite float",
    str: "str without null characters",
    tuple[str, ...]: "a tuple of strings without null characters",
}


def _typed(name: str, value: Any, hint: Any, problems: list[str]) -> Any:
    """Returns `value` as `hint` (int may stand for float, a list for a tuple), or notes a problem."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and isinstance(value, int) and abs(value) >= _MAX_INTEGER:
        low, high = _BOUNDS.get(name, (-_MAX_INTEGER, _MAX_INTEGER))
        problems.append(f"{name}={_show(value)} must lie between {low} and {high}")
        return None
    if hint is float and is_number and math.isfinite(value):
        return float(value)
    if hint is int and is_number and isinstance(value, int):
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and _is_text(value):
        return value
    if hint == tuple[str, ...] and isinstance(value, (tuple, list)) and all(map(_is_text, value)):
        return tuple(value)
    problems.append(f"{name}={_show(value)} must be {_WANTED[hint]}")
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value  # which ends a path


def _show(value: Any) -> str:
    """Returns `value` as it was given, within limits."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= 500 else f"{text[:500]}..."


def _refuse_unread(problems: list[str], name: str, files: str | None, source_name: str, source: str) -> None:
    # Passed over, they would leave training to go on with other stories.
    if files:
        problems.append(
            f"{name}={_show(files)} is not read with {source_name}={source}; "
            f"add --config.{source_name}=files, or leave it out"
        )


def _check_values(seed: int | None, sections: dict[str, dict[str, Any]]) -> list[str]:
    """Returns what is wrong with the values that are there; None stands for one whose type is wrong already."""
    problems: list[str] = []
    data, tokenizer, train = sections["data"], sections["tokenizer"], sections["train"]
    for name, (low, high) in _BOUNDS.items():
        section, _, key = name.rpartition(".")
        value = sections[section][key] if section else seed
        if value is not None and not low <= value <= high:
            problems.append(f"{name}={value} must lie between {low} and {high}")
    _check_choice(problems, "data.source", data["source"], ("hub", "files", "sample"))
    _check_choice(problems, "tokenizer.source", tokenizer["source"], ("stories", "hub", "files"))
    _check_choice(problems, "model.dtype", sections["model"]["dtype"], ("bfloat16", "float32"))
    if data["source"] == "hub":
        _check_hub(problems, "data", data)
    for key in ("train_files", "valid_files"):
        if data["source"] == "files" and data[key] is not None and not data[key].strip():
            problems.append(f"data.{key} is empty but data.source=files; give --config.data.{key}=PATH[,PATH or glob]")
        if data["source"] in ("hub", "sample"):
            _refuse_unread(problems, f"data.{key}", data[key], "data.source", data["source"])
    if not tokenizer["path"]:
        if tokenizer["source"] == "hub":
            _check_hub(problems, "tokenizer", tokenizer)
        files = tokenizer["train_files"]
        if tokenizer["source"] in ("stories", "hub"):
            _refuse_unread(problems, "tokenizer.train_files", files, "tokenizer.source", tokenizer["source"])
        if tokenizer["source"] == "files" and files is not None and not files.strip():
            problems.append(
                "tokenizer.train_files is empty but tokenizer.source=files; "
                "give --config.tokenizer.train_files=PATH or --config.tokenizer.path=TOKENIZER_JSON"
            )
    if train["num_epochs"] == 0 and train["max_updates"] == 0:
        problems.append("train.num_epochs=0 and train.max_updates=0: nothing to train; set one of them")
    if sections["sample"]["prompts"] == ():
        problems.append("sample.prompts is empty; give at least one, for instance ('Once upon a time',)")
    spike = sections["logging"]["loss_spike_factor"]
    if spike is not None and 0 < spike <= 1:
        problems.append(f"logging.loss_spike_factor={spike} must be above 1, or 0 for no warnings of loss spikes")
    if data["cache_dir"] == "":
        problems.append("data.cache_dir is empty; give a folder, for instance --config.data.cache_dir=cache")
    return problems + _check_model(sections["model"]) + _check_optim(sections["optim"])


_MAX_HEADS = 1_024
_MAX_EPOCHS = 1_000_000
_MAX_UPDATES = 1_000_000_000  # counted in int32
MAX_GRAD_ACCUM_STEPS = 65_536
# Lowest and highest, both allowed.
_BOUNDS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "data.max_stories": (0, 2**40),
    "data.sequence_length": (2, 1_048_576),
    "tokenizer.vocab_size": (257, 1_000_000),
    "tokenizer.max_samples": (0, 2**40),
    "model.d_model": (2, 65_536),
    "model.num_layers": (1, 1_000),
    "model.num_heads": (1, _MAX_HEADS),
    "model.num_kv_heads": (0, _MAX_HEADS),
    "model.d_ff": (1, 1_048_576),
    "model.rope_theta": (1.0, 1e12),
    "model.dropout": (0.0, 0.9),
    "train.batch_size": (1, 1_048_576),
    "train.grad_accum_steps": (1, MAX_GRAD_ACCUM_STEPS),
    "train.num_epochs": (0, _MAX_EPOCHS),
    "train.max_updates": (0, _MAX_UPDATES),
    "train.article_loss_weight": (1e-3, 1e3),
    "optim.learning_rate": (0.0, 10.0),
    "optim.min_learning_rate": (0.0, 10.0),
    "optim.warmup_updates": (0, 1_000_000_000),
    "optim.weight_decay": (0.0, 10.0),
    "optim.beta1": (0.0, 0.9999),
    "optim.beta2": (0.5, 0.99999),  # below, Adam divides by hardly more than the gradient itself, and diverges
    "optim.max_grad_norm": (1e-6, 1e9),
    "optim.muon_learning_rate": (0.0, 10.0),
    "optim.muon_momentum": (0.0, 0.99999),
    "eval.every": (1, 1_000_000_000),
    "eval.max_batches": (0, 1_000_000_000),
    "eval.early_stopping_patience": (0, 1_000_000_000),
    "checkpoint.every": (1, 1_000_000_000),
    "checkpoint.keep": (1, 10_000),
    "sample.max_new_tokens": (1, 1_048_576),
    "sample.temperature": (0.0, 100.0),
    "logging.every": (1, 1_000_000_000),
    "logging.loss_spike_factor": (0.0, 1e6),
}


def _check_choice(problems: list[str], name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        problems.append(f"{name}={_show(value)} must be one of {', '.join(choices)}")


def _check_hub(problems: list[str], section: str, values: dict[str, Any]) -> None:
    if values["hub_name"] is not None and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", values["hub_name"], re.A):
        problems.append(f"{section}.hub_name={_show(values['hub_name'])} must read OWNER/NAME")
    if values["hub_revision"] is not None and not re.fullmatch(r"[0-9a-f]{40}", values["hub_revision"]):
        problems.append(
            f"{section}.hub_revision={_show(values['hub_revision'])} must be a 40-digit commit, "
            "so that the data cannot change under a run; the data set's page on the Hub lists its commits"
        )


def _check_model(model: dict[str, Any]) -> list[str]:
    problems: list[str] = []
    d_model, num_heads, num_kv_heads = model["d_model"], model["num_heads"], model["num_kv_heads"]
    if None in (d_model, num_heads, num_kv_heads) or not 1 <= num_heads <= _MAX_HEADS or d_model < 1:
        return problems
    if d_model % num_heads:
        suggestion = max(heads for heads in range(1, num_heads + 1) if d_model % heads == 0)
        problems.append(
            f"model.num_heads={num_heads} must divide model.d_model={d_model}; "
            f"try --config.model.num_heads={suggestion}"
        )
    elif (d_model // num_heads) % 2:
        problems.append(
            f"model.d_model={d_model} / model.num_heads={num_heads} gives heads of width {d_model // num_heads}; "
            "rotary embeddings need an even width"
        )
    if num_kv_heads > 0 and num_heads % num_kv_heads:
        problems.append(
            f"model.num_kv_heads={num_kv_heads} must divide model.num_heads={num_heads} (0 means the same number)"
        )
    return problems


def _check_optim(optim: dict[str, Any]) -> list[str]:
    problems: list[str] = []
    lowest, highest, muon = optim["min_learning_rate"], optim["learning_rate"], optim["muon_learning_rate"]
    if lowest is not None and highest is not None and lowest > highest:
        problems.append(
            f"optim.min_learning_rate={lowest} must not exceed optim.learning_rate={highest}, where the cosine starts"
        )
    if muon and highest == 0:
        problems.append(
            f"optim.muon_learning_rate={muon} needs optim.learning_rate above 0, to whose schedule it is proportional; "
            "give --config.optim.learning_rate, or --config.optim.muon_learning_rate=0 for AdamW alone"
        )
    return problems
