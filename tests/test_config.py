"""From a config file to the resolved config: nothing is ignored, nothing is guessed, every problem is named."""

import ast
import dataclasses
import inspect
import json
import math
import runpy
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

from tinystories_jax.config import (
    Config,
    Schedule,
    contradictions,
    from_dict,
    resolve,
    to_dict,
    with_data,
    with_unknown_data,
)
from tinystories_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.py"))}
SECTIONS = {name: hint for name, hint in get_type_hints(Config).items() if dataclasses.is_dataclass(hint)}


def read_config(name: str) -> dict[str, Any]:
    return runpy.run_path(str(CONFIGS[name]))["get_config"]().to_dict()


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


ALL_LEAVES = [(name, leaf) for name in CONFIGS for leaf, _ in leaves(read_config(name))]
EVERY_LEAF = pytest.mark.parametrize(("name", "leaf"), ALL_LEAVES, ids=[f"{name}-{leaf}" for name, leaf in ALL_LEAVES])


def changed(name: str = "top10k", **new_values: Any) -> dict[str, Any]:
    """Returns a config with some leaves replaced; `section__key` names a leaf."""
    values = read_config(name)
    for leaf, value in new_values.items():
        section, _, key = leaf.rpartition("__")
        (values[section] if section else values)[key] = value
    return values


def take(values: dict[str, Any], leaf: str) -> Any:
    section, _, key = leaf.rpartition(".")
    return (values[section] if section else values).pop(key)


def problems_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        resolve(values)
    return caught.value.problems


def only_problem_of(values: Mapping[str, Any]) -> str:
    (problem,) = problems_of(values)
    return problem


def with_top10k_data(config: Config, *, vocab_size: int = 300, num_blocks: int = 1000) -> Config:
    return with_data(config, vocab_size=vocab_size, num_blocks=num_blocks)


@EVERY_LEAF
def test_each_leaf_of_each_config_reaches_the_resolved_config(name, leaf):
    values = read_config(name)
    resolved = to_dict(resolve(values))
    expected = take(values, leaf)
    if leaf == "model.num_kv_heads" and expected == 0:
        expected = values["model"]["num_heads"]
    assert take(resolved, leaf) == expected


@EVERY_LEAF
def test_a_missing_and_a_misspelt_leaf_are_refused_by_name(name, leaf):
    values = read_config(name)
    value = take(values, leaf)
    assert only_problem_of(values).startswith(f"{leaf} is missing")
    section, _, key = leaf.rpartition(".")
    (values[section] if section else values)[key + "_"] = value
    missing, unknown = sorted(problems_of(values), key=lambda problem: "is missing" not in problem)
    assert missing.startswith(f"{leaf} is missing")
    assert unknown.startswith(f"{leaf}_: ")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_supplies_each_field_that_is_not_derived(name):
    supplied = {leaf for leaf, _ in leaves(read_config(name))}
    wanted = {"seed"} | {
        f"{section}.{item.name}"
        for section, section_type in SECTIONS.items()
        for item in dataclasses.fields(section_type)
        if not item.metadata.get("derived")
    }
    assert supplied == wanted


def test_a_config_dict_resolves_as_a_plain_one_does():
    config_dict = runpy.run_path(str(CONFIGS["top10k"]))["get_config"]()
    assert resolve(config_dict) == resolve(read_config("top10k"))


@pytest.mark.parametrize("section", SECTIONS)
def test_a_missing_section_and_a_leaf_in_its_place_are_refused_by_name(section):
    values = read_config("top10k")
    values[section] = 3
    assert section in only_problem_of(values)
    del values[section]
    assert section in only_problem_of(values)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("train__max_updates", 10**16, "train.max_updates=10000000000000000 must lie between 0 and 1000000000"),
        ("train__max_updates", 1.5, "train.max_updates=1.5 must be int"),
        ("optim__learning_rate", math.nan, "optim.learning_rate=nan must be a finite float"),
        ("data__hub_name", "a\0b", "data.hub_name='a\\x00b' must be str without null characters"),
        ("sample__prompts", "a", "sample.prompts='a' must be a tuple of strings without null characters"),
        ("model__remat", 1, "model.remat=1 must be bool"),
    ],
)
def test_a_value_of_another_type_is_refused_by_what_it_must_be(field, value, problem):
    assert only_problem_of(changed(**{field: value})) == problem


def test_a_section_that_is_none_is_told_from_one_that_is_missing():
    values = read_config("top10k")
    assert only_problem_of({**values, "train": 3}) == "section train=3 must be a ConfigDict; see configs/top10k.py"
    assert only_problem_of({**values, "train": np.array([1, 2])}).startswith("section train=array([1, 2]) must be")
    assert only_problem_of({**values, "train": {}}) == "section train is missing; see configs/top10k.py"


def test_too_many_epochs_are_told_of_by_the_field_that_was_set():
    for field in ("max_updates", "num_epochs"):
        values: dict[str, Any] = {f"train__{field}": 10**6}
        config = resolve(changed(**values))
        with pytest.raises(UserError, match=rf"^train.{field}=1,000,000: .* a lower --config.train.{field}$"):
            with_top10k_data(config, num_blocks=1)


def test_an_unknown_section_is_refused_by_name():
    assert "optimizer" in only_problem_of({**read_config("top10k"), "optimizer": {"learning_rate": 1e-3}})


def test_configs_import_nothing_of_the_package():
    for path in CONFIGS.values():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add("." * node.level + (node.module or ""))
        assert {module.split(".")[0] for module in imported} <= {"ml_collections", "pathlib", "runpy", "typing"}, path


def unread_fields(sources: Iterable[str]) -> set[str]:
    """Returns the fields `section.name` of all config dataclasses that no source reads.

    A read is an attribute of something that is called like the section (`config.eval.every`, `optim.beta1`), or that
    the same source annotates with the section's class (`config: ModelConfig`).
    """
    types = {**SECTIONS, "schedule": Schedule, "config": Config}
    read: set[tuple[str, str]] = set()
    for source in sources:
        tree = ast.parse(source)
        sections_of = names_by_annotation(tree, {cls.__name__: section for section, cls in types.items()})
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = last_name(node.value)
                read |= {(section, node.attr) for section in {owner.lstrip("_"), *sections_of[owner]}}
    fields = {(section, item.name) for section, cls in types.items() for item in dataclasses.fields(cls)}
    return {f"{section}.{name}" for section, name in fields - read}


def resolved_with_schedule() -> Config:
    return with_top10k_data(resolve(read_config("top10k")))


def names_by_annotation(tree: ast.AST, section_of_class: Mapping[str, str]) -> dict[str, set[str]]:
    names: dict[str, set[str]] = defaultdict(set)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and isinstance(node.annotation, ast.Name):
            section = section_of_class.get(node.annotation.id)
            if section:
                names[node.arg].add(section)
    return names


def last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def package_sources() -> list[str]:
    """Returns the sources whose reading counts: all but config.py, of which only the derivation of the schedule."""
    outside = [path for path in (ROOT / "tinystories_jax").rglob("*.py") if path.name != "config.py"]
    epoch_at = textwrap.dedent(inspect.getsource(Schedule.epoch_at)).replace("self.", "schedule.")
    return [*(path.read_text() for path in outside), inspect.getsource(with_data), epoch_at]


def test_every_field_is_read_by_the_package():
    assert unread_fields(package_sources()) == set()


@pytest.mark.parametrize("field", ["eval.every", "logging.every", "checkpoint.every", "optim.beta2", "model.remat"])
def test_a_field_that_nothing_reads_is_found(field):
    section, name = field.split(".")
    sources = [source.replace(f"{section}.{name}", "x") for source in package_sources()]
    if section == "model":
        sources = [source.replace(f"config.{name}", "x") for source in sources]
    assert unread_fields(sources) == {field}


WRONG_TYPES = [
    ("seed", True),
    ("seed", 1.0),
    ("seed", None),
    ("model__d_model", "448"),
    ("model__d_model", True),
    ("model__d_model", 448.0),
    ("model__d_model", None),
    ("model__remat", 1),
    ("model__dtype", 32),
    ("model__rope_theta", "10000"),
    ("optim__learning_rate", True),
    ("optim__learning_rate", math.nan),
    ("optim__learning_rate", math.inf),
    ("optim__learning_rate", -math.inf),
    ("optim__learning_rate", None),
    ("optim__learning_rate", [5e-4]),
    ("data__source", None),
    ("data__train_files", ("a.txt", "b.txt")),
    ("data__max_stories", 10**400),
    ("sample__prompts", "Once upon a time"),
    ("sample__prompts", (1, 2)),
    ("logging__tensorboard", "yes"),
    ("logging__tensorboard", None),
]


@pytest.mark.parametrize(("leaf", "value"), WRONG_TYPES, ids=[f"{leaf}-{value!r:.20}" for leaf, value in WRONG_TYPES])
def test_a_value_of_another_type_is_refused_with_its_name_and_the_value(leaf, value):
    told = "must lie between 0 and " if leaf == "data__max_stories" else "must be "
    assert only_problem_of(changed(**{leaf: value})).startswith(f"{leaf.replace('__', '.')}={value!r} {told}")


def test_an_int_stands_for_a_float_and_a_list_for_a_tuple():
    config = resolve(changed(model__rope_theta=50_000, optim__weight_decay=0, sample__prompts=["A", "B"]))
    assert isinstance(config.model.rope_theta, float)
    assert isinstance(config.optim.weight_decay, float)
    assert config.sample.prompts == ("A", "B")


OUT_OF_RANGE = {
    "seed": (-1, 2**31),
    "data__max_stories": (-1,),
    "data__sequence_length": (0, 1, -512),
    "tokenizer__vocab_size": (0, 256, 1_000_001),
    "tokenizer__max_samples": (-1,),
    "model__d_model": (0, -448),
    "model__num_layers": (0, -1),
    "model__num_heads": (0, -7),
    "model__num_kv_heads": (-1,),
    "model__d_ff": (0,),
    "model__rope_theta": (0.0, -1.0),
    "model__dropout": (-0.1, 1.0),
    "train__batch_size": (0, -64),
    "train__grad_accum_steps": (0,),
    "train__num_epochs": (-1,),
    "train__max_updates": (-1,),
    "train__article_loss_weight": (0.0, -1.0),
    "optim__weight_decay": (-0.1,),
    "optim__warmup_updates": (-1,),
    "optim__beta1": (-0.1, 1.0),
    "optim__beta2": (-0.1, 1.0),
    "optim__max_grad_norm": (0.0, -1.0),
    "optim__muon_learning_rate": (-0.1, 11.0),
    "optim__muon_momentum": (-0.1, 1.0),
    "eval__every": (0, -1),
    "eval__max_batches": (-1,),
    "eval__early_stopping_patience": (-1,),
    "checkpoint__every": (0,),
    "checkpoint__keep": (0,),
    "sample__max_new_tokens": (0,),
    "sample__temperature": (-0.1,),
    "logging__every": (0,),
    "logging__loss_spike_factor": (-0.1,),
}


@pytest.mark.parametrize(
    ("leaf", "value"), [(leaf, value) for leaf, values in OUT_OF_RANGE.items() for value in values]
)
def test_a_value_out_of_range_is_refused_with_its_name_the_value_and_the_range(leaf, value):
    problems = problems_of(changed(**{leaf: value}))
    assert problems[0].startswith(f"{leaf.replace('__', '.')}={value} must lie between ")


def test_every_number_but_booleans_has_a_range():
    numbers = {leaf for leaf, value in leaves(read_config("top10k")) if isinstance(value, (int, float))}
    without = {"model.tie_embeddings", "model.remat", "logging.tensorboard"}
    tested = {leaf.replace("__", ".") for leaf in OUT_OF_RANGE}
    assert numbers - without - tested == {"optim.learning_rate", "optim.min_learning_rate"}


@pytest.mark.parametrize(
    ("new_values", "said"),
    [
        ({"model__num_heads": 6}, ["model.num_heads=6", "model.d_model=448", "--config.model.num_heads=4"]),
        ({"model__d_model": 21}, ["model.d_model=21", "width 3", "even"]),
        ({"model__num_kv_heads": 3}, ["model.num_kv_heads=3", "model.num_heads=7"]),
        ({"model__num_kv_heads": 14}, ["model.num_kv_heads=14", "model.num_heads=7"]),
        ({"optim__min_learning_rate": 6e-4}, ["optim.min_learning_rate=0.0006", "optim.learning_rate=0.0005"]),
        (
            {"optim__muon_learning_rate": 0.02, "optim__learning_rate": 0.0, "optim__min_learning_rate": 0.0},
            ["optim.muon_learning_rate=0.02", "optim.learning_rate above 0", "--config.optim.muon_learning_rate=0"],
        ),
        ({"data__source": "files", "data__train_files": "a.txt"}, ["data.valid_files is empty", "--config.data."]),
        ({"data__source": "files", "data__valid_files": "a.txt"}, ["data.train_files is empty", "--config.data."]),
        ({"data__train_files": "a.txt"}, ["data.train_files='a.txt'", "source=hub", "--config.data.source=files"]),
        (
            {"data__source": "sample", "data__valid_files": "b"},
            ["data.valid_files='b'", "source=sample", "leave it out"],
        ),
        ({"tokenizer__train_files": "c"}, ["tokenizer.train_files='c'", "--config.tokenizer.source=files"]),
        ({"logging__loss_spike_factor": 0.9}, ["logging.loss_spike_factor=0.9", "above 1", "0"]),
        ({"data__source": "wikipedia"}, ["data.source='wikipedia'", "hub", "files", "sample"]),
        ({"tokenizer__source": "sample"}, ["tokenizer.source='sample'", "stories", "hub", "files"]),
        ({"model__dtype": "float16"}, ["model.dtype='float16'", "bfloat16", "float32"]),
        ({"data__hub_revision": "main"}, ["data.hub_revision='main'", "40-digit commit"]),
        ({"data__hub_revision": ""}, ["data.hub_revision=''", "40-digit commit"]),
        ({"data__hub_name": "TinyStories"}, ["data.hub_name='TinyStories'", "OWNER/NAME"]),
        ({"tokenizer__source": "files"}, ["tokenizer.train_files is empty", "--config.tokenizer.path"]),
        ({"train__num_epochs": 0}, ["train.num_epochs=0", "train.max_updates=0"]),
        ({"data__cache_dir": ""}, ["data.cache_dir is empty"]),
    ],
)
def test_values_that_contradict_each_other_are_refused_with_a_way_out(new_values, said):
    problem = only_problem_of(changed(**new_values))
    for words in said:
        assert words in problem


def test_an_unpinned_tokenizer_source_is_refused_unless_a_ready_tokenizer_replaces_it():
    unpinned = {"tokenizer__source": "hub", "tokenizer__hub_name": "a/b"}
    assert "tokenizer.hub_revision=''" in only_problem_of(changed(**unpinned))
    resolve(changed(**unpinned, tokenizer__path="tokenizer.json"))


def test_a_source_that_is_not_used_need_not_be_complete():
    resolve(changed(data__source="sample", data__hub_revision="", data__hub_name=""))
    resolve(changed(data__source="files", data__train_files="a.txt", data__valid_files="b.txt", data__hub_revision=""))


def test_all_problems_come_at_once():
    values = changed(model__num_heads=5, optim__beta1=1.5, data__source="disk", seed=-1, optim__min_learning_rate=1.0)
    problems = "\n".join(problems_of(values))
    for planted in ("model.num_heads=5", "optim.beta1=1.5", "'disk'", "seed=-1", "min_learning_rate=1.0"):
        assert planted in problems
    assert len(problems.splitlines()) == 5

    values = changed(model__num_heads="7", eval__every=None, logging__level=3)
    del values["train"]["batch_size"], values["seed"], values["sample"]
    problems = "\n".join(problems_of({**values, "wandb": {}}))
    for planted in ("num_heads='7'", "eval.every=None", "logging.level", "train.batch_size", "seed", "sample", "wandb"):
        assert planted in problems
    assert len(problems.splitlines()) == 7


def test_one_problem_is_one_line():
    values = changed(data__source="a\nb", data__hub_name="c\nd", model__dtype="\n", logging__tensorboard="\n")
    assert all("\n" not in problem for problem in problems_of(values))


def schedule_of(num_blocks: int, **new_values: Any) -> Schedule:
    defaults = {"train__batch_size": 4, "train__grad_accum_steps": 2, "train__num_epochs": 3}
    schedule = with_top10k_data(resolve(changed(**{**defaults, **new_values})), num_blocks=num_blocks).schedule
    assert schedule is not None
    return schedule


def test_updates_come_from_the_epochs():
    schedule = schedule_of(80, optim__warmup_updates=5)
    assert (schedule.num_blocks, schedule.blocks_per_update, schedule.total_updates) == (80, 8, 30)
    assert schedule.epoch_ends == (10, 20, 30)
    assert schedule.warmup_updates == 5
    assert [schedule.epoch_at(update) for update in (0, 5, 30)] == [0.0, 0.5, 3.0]


def test_an_epoch_may_end_within_an_update():
    schedule = schedule_of(43)
    # 43, 86 and 129 blocks at 8 an update.
    assert schedule.epoch_ends == (6, 11, 17)
    assert schedule.total_updates == 17
    assert schedule.epoch_at(schedule.total_updates) >= 3 > schedule.epoch_at(schedule.total_updates - 1)


@pytest.mark.parametrize(("max_updates", "epoch_ends"), [(1, ()), (5, ()), (6, (6,)), (11, (6, 11)), (40, None)])
def test_max_updates_goes_before_the_epochs(max_updates, epoch_ends):
    schedule = schedule_of(43, train__max_updates=max_updates)
    assert schedule.total_updates == max_updates
    if epoch_ends is None:
        epoch_ends = tuple(math.ceil(43 * epoch / 8) for epoch in range(1, max_updates * 8 // 43 + 1))
    assert schedule.epoch_ends == epoch_ends
    assert all(end <= max_updates for end in schedule.epoch_ends)


def test_epochs_shorter_than_an_update_have_no_end_of_their_own():
    schedule = schedule_of(3, train__num_epochs=5)
    assert schedule.epoch_ends == ()
    assert schedule.total_updates == 2


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 1), (9, 4), (999, 499), (1000, 500), (5000, 500)])
def test_the_warm_up_takes_at_most_half_of_the_run(total, warmup):
    assert schedule_of(43, train__max_updates=total, optim__warmup_updates=500).warmup_updates == warmup


def test_no_block_is_refused_with_the_way_out():
    with pytest.raises(UserError, match=r"data\.sequence_length=512.*--config\.data\.sequence_length"):
        with_data(resolve(read_config("top10k")), vocab_size=300, num_blocks=0)


def test_more_updates_than_can_be_counted_are_refused():
    config = resolve(changed(train__num_epochs=1_000_000, train__batch_size=1, train__grad_accum_steps=1))
    with_data(config, vocab_size=300, num_blocks=1_000)
    with pytest.raises(UserError, match=r"train\.num_epochs=1,000,000 epochs are 1,001,000,000 updates"):
        with_data(config, vocab_size=300, num_blocks=1_001)


@pytest.mark.parametrize(("max_updates", "num_epochs"), [(1, 0), (1_000_000_000, 1), (0, 1_000_000)])
@pytest.mark.parametrize(("batch_size", "grad_accum_steps"), [(1, 1), (1_048_576, 65_536)])
def test_unknown_data_refuse_no_length(max_updates, num_epochs, batch_size, grad_accum_steps):
    lengths = {"train__max_updates": max_updates, "train__num_epochs": num_epochs}
    sizes = {"train__batch_size": batch_size, "train__grad_accum_steps": grad_accum_steps}
    config = with_unknown_data(resolve(changed(**lengths, **sizes)), vocab_size=4_321)
    assert config.schedule is not None
    assert config.schedule.total_updates == (max_updates or 1_000 * num_epochs)
    assert config.model.vocab_size == 4_321


def test_what_only_the_data_can_tell_is_empty_before_it_and_nothing_else_changes():
    before = resolve(read_config("top10k"))
    assert before.schedule is None
    assert before.model.vocab_size == 0
    after = with_top10k_data(before, vocab_size=1234)
    assert after.model.vocab_size == 1234
    unchanged = dataclasses.replace(after, schedule=None, model=dataclasses.replace(after.model, vocab_size=0))
    assert unchanged == before


def test_widths_of_heads_are_derived():
    assert resolve(read_config("top10k")).model.head_dim == 64
    assert resolve(changed(model__num_kv_heads=1)).model.num_kv_heads == 1
    assert resolve(changed(model__num_kv_heads=0)).model.num_kv_heads == 7


@pytest.mark.parametrize(
    ("name", "vocab_size", "expected"),
    [("top10k", 10_000, 22_750_784), ("baseline32k", 32_000, 32_606_784), ("cpu_real", 4_096, 1_377_408)],
)
def test_the_configs_have_the_parameter_counts_they_promise(name, vocab_size, expected):
    from tinystories_jax.model.transformer import num_params

    config = with_top10k_data(resolve(read_config(name)), vocab_size=vocab_size)
    assert config.tokenizer.vocab_size == vocab_size
    assert num_params(config.model) == expected
    if name != "top10k":
        assert f"{expected:,}" in CONFIGS[name].read_text()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_comes_back_from_json(name):
    config = with_top10k_data(resolve(read_config(name)), num_blocks=43)
    restored = from_dict(json.loads(json.dumps(to_dict(config))))
    assert restored == config
    assert hash(restored) == hash(config)  # jit takes it as a static argument


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def remove(values: dict[str, Any]) -> None:
        for key in path[:-1]:
            values = values[key]
        del values[path[-1]]

    return remove


def setting(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def replace(values: dict[str, Any]) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    return replace


@pytest.mark.parametrize(
    "damage",
    [
        without("schedule"),
        without("schedule", "total_updates"),
        without("model", "vocab_size"),
        without("model"),
        without("seed"),
        setting(None, "schedule"),
        setting([1, 2], "schedule"),
        setting("soon", "schedule", "epoch_ends"),
        setting(None, "schedule", "epoch_ends"),
        setting(1, "schedule", "extra"),
        setting("many", "schedule", "total_updates"),
        setting(None, "schedule", "num_blocks"),
        setting(0, "schedule", "num_blocks"),
        setting("x", "model", "vocab_size"),
        setting(None, "model", "vocab_size"),
        setting(0, "model", "vocab_size"),
        setting(3, "model", "extra"),
        setting("3", "model", "d_model"),
    ],
)
def test_a_damaged_config_of_a_run_is_refused(damage):
    values = to_dict(resolved_with_schedule())
    damage(values)
    with pytest.raises(UserError):
        from_dict(values)


@pytest.mark.parametrize("garbage", [{}, {"seed": 0}, [], None, "config", 3, [1, 2]], ids=repr)
def test_what_is_no_config_is_refused(garbage):
    with pytest.raises(UserError):
        from_dict(garbage)


FREE = {
    "data__source": "sample",
    "data__hub_name": "a/b",
    "data__hub_revision": "0" * 40,
    "data__train_files": "elsewhere.txt",
    "data__valid_files": "elsewhere.txt",
    "data__cache_dir": "/elsewhere",
    "tokenizer__path": "elsewhere/tokenizer.json",
    "tokenizer__train_files": "elsewhere.txt",
    "eval__every": 7,
    "eval__early_stopping_patience": 7,
    "checkpoint__every": 7,
    "checkpoint__keep": 7,
    "sample__prompts": ("Tom",),
    "sample__max_new_tokens": 7,
    "sample__temperature": 0.7,
    "logging__every": 7,
    "logging__loss_spike_factor": 7.0,
    "logging__tensorboard": False,
    "model__remat": True,
}
BINDING = {
    "seed": 1,
    "data__max_stories": 7,
    "data__sequence_length": 128,
    "tokenizer__vocab_size": 500,
    "tokenizer__max_samples": 7,
    "tokenizer__source": "files",
    "tokenizer__hub_name": "a/b",
    "tokenizer__hub_subset": "x",
    "tokenizer__hub_revision": "0" * 40,
    "model__d_model": 896,
    "model__num_layers": 2,
    "model__num_heads": 14,
    "model__num_kv_heads": 1,
    "model__d_ff": 7,
    "model__rope_theta": 7.0,
    "model__tie_embeddings": False,
    "model__dropout": 0.1,
    "model__dtype": "float32",
    "train__batch_size": 7,
    "train__grad_accum_steps": 7,
    "train__num_epochs": 7,
    "train__max_updates": 7,
    "train__article_loss_weight": 7.0,
    "eval__max_batches": 7,
    "optim__learning_rate": 7e-4,
    "optim__min_learning_rate": 7e-6,
    "optim__warmup_updates": 7,
    "optim__weight_decay": 0.7,
    "optim__beta1": 0.7,
    "optim__beta2": 0.7,
    "optim__max_grad_norm": 0.7,
    "optim__muon_learning_rate": 7e-3,
    "optim__muon_momentum": 0.7,
}


def contradictions_of(new_values: dict[str, Any]) -> list[str]:
    # Files are refused where the source is another.
    of_both, files = {}, {}
    if "tokenizer__train_files" in new_values:
        of_both = {"tokenizer__source": "files", "tokenizer__train_files": "a.txt"}
    elif new_values.get("tokenizer__source") == "files":
        files = {"tokenizer__train_files": "other.txt"}
    elif {"data__train_files", "data__valid_files"} & set(new_values):
        files = {"data__source": "files", "data__train_files": "a.txt", "data__valid_files": "b.txt"}
    of_run = with_top10k_data(resolve(changed(**of_both)))
    return contradictions(of_run, with_top10k_data(resolve(changed(**{**of_both, **files, **new_values}))))


def test_every_leaf_is_either_free_or_binding():
    assert {leaf.replace("__", ".") for leaf in (FREE | BINDING)} == {leaf for leaf, _ in leaves(read_config("top10k"))}


def test_the_same_config_contradicts_nothing():
    assert contradictions_of({}) == []


@pytest.mark.parametrize("leaf", FREE)
def test_a_free_field_may_change_in_a_run(leaf):
    assert contradictions_of({leaf: FREE[leaf]}) == []


@pytest.mark.parametrize("leaf", BINDING)
def test_a_binding_field_may_not_change_in_a_run(leaf):
    lines = contradictions_of({leaf: BINDING[leaf]})
    name, was = leaf.replace("__", "."), dict(leaves(read_config("top10k")))[leaf.replace("__", ".")]
    was = 7 if leaf == "model__num_kv_heads" else was
    assert f"{name}: the run has {was}, requested {BINDING[leaf]}" in lines
    # Nothing else is listed, but that as many key/value heads as heads were asked for; not what is derived from it.
    assert [line for line in lines if not line.startswith((name, "model.num_kv_heads"))] == []


def test_other_data_and_another_vocabulary_are_contradictions():
    config = resolve(read_config("top10k"))
    of_run = with_top10k_data(config)
    assert any("model.vocab_size" in line for line in contradictions(of_run, with_top10k_data(config, vocab_size=301)))
    assert any("schedule.num_blocks" in x for x in contradictions(of_run, with_top10k_data(config, num_blocks=999)))
