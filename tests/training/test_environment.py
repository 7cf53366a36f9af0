"""The history of a run's starts: kept over restarts, closed however a process ends."""

import json
from pathlib import Path
from typing import Any

import pytest

from tinystories_jax.training.environment import recorded_start


def starts_of(workdir: Path) -> list[dict[str, Any]]:
    return json.loads((workdir / "environment.json").read_text())["starts"]


def test_each_start_is_added_and_open_until_it_ends(tmp_path):
    with recorded_start(tmp_path):
        (first,) = starts_of(tmp_path)
        assert "ended" not in first
    with recorded_start(tmp_path):
        closed, second = starts_of(tmp_path)
        assert closed["ended"] >= first["started"]
        assert "ended" not in second
    fields = {"started", "ended", "command", "settings", "device", "num_devices", "platform", "versions"}
    assert fields == set(second) | {"ended"}
    assert {"python", "jax", "flax", "optax", "orbax-checkpoint", "tokenizers", "numpy"} < set(second["versions"])


def test_what_changes_the_compiled_programs_is_kept_and_nothing_else_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=")
    monkeypatch.setenv("SECRET_KEY", "secret")
    with recorded_start(tmp_path):
        pass
    settings = starts_of(tmp_path)[0]["settings"]
    assert settings["XLA_FLAGS"] == "--xla_dump_to="
    assert all(name.startswith(("JAX_", "XLA_")) for name in settings)


def test_a_start_that_fails_ends_too(tmp_path):
    with pytest.raises(ValueError, match="a fault"), recorded_start(tmp_path):
        raise ValueError("a fault")
    assert "ended" in starts_of(tmp_path)[0]


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"starts": 3}', "\xff"])
def test_a_damaged_history_stops_no_training(tmp_path, damage):
    (tmp_path / "environment.json").write_bytes(damage.encode("latin-1"))
    with recorded_start(tmp_path):
        pass
    assert len(starts_of(tmp_path)) == 1
