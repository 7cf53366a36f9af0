"""The peer computes our function: Hugging Face's Llama with our parameters gives our loss. Where PyTorch is installed,
it is trained and writes as well; it is an optional package of some hundred MB that the tests do without."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.tiny import read_tiny_values
from tinystories_jax.analysis.benchmark import peer_rounds
from tinystories_jax.analysis.benchmark.inputs import with_synthetic_data
from tinystories_jax.analysis.benchmark.peer_rounds import (
    TUNED_MALLOC,
    compare_decoding,
    compare_training,
    require_peer,
)
from tinystories_jax.analysis.benchmark.reference import to_llama_weights, write_reference
from tinystories_jax.analysis.benchmark.table import format_section
from tinystories_jax.config import Config, resolve
from tinystories_jax.errors import UserError
from tinystories_jax.model.transformer import init_params

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch, which only --peer needs, is not installed"
)


def tiny_config(**model: Any) -> Config:
    values = read_tiny_values()
    values.tokenizer.vocab_size = 300
    values.model.update(num_layers=1, rope_theta=100.0, **model)
    return with_synthetic_data(resolve(values))


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_weights_have_the_names_and_shapes_of_llama(tie_embeddings):
    config = tiny_config(tie_embeddings=tie_embeddings)
    params = init_params(config.model, jax.random.key(0))
    weights = to_llama_weights(params)
    assert sum(weight.size for weight in weights.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert {name: weight.shape for name, weight in weights.items()} == {
        "model.embed_tokens.weight": (300, 32),
        "model.layers.0.input_layernorm.weight": (32,),
        "model.layers.0.self_attn.q_proj.weight": (32, 32),
        "model.layers.0.self_attn.k_proj.weight": (16, 32),
        "model.layers.0.self_attn.v_proj.weight": (16, 32),
        "model.layers.0.self_attn.o_proj.weight": (32, 32),
        "model.layers.0.post_attention_layernorm.weight": (32,),
        "model.layers.0.mlp.gate_proj.weight": (48, 32),
        "model.layers.0.mlp.up_proj.weight": (48, 32),
        "model.layers.0.mlp.down_proj.weight": (32, 48),
        "model.norm.weight": (32,),
        **({} if tie_embeddings else {"lm_head.weight": (300, 32)}),
    }


def llama_loss(weights: Any, block: np.ndarray, config: Config) -> float:
    """Returns the loss of one layer with tied embeddings, in float64, by Llama's definition and names alone."""
    model, length = config.model, block.shape[1] - 1
    of = {name: weights[name].astype(np.float64) for name in weights.files if name != "block"}

    def normalise(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * of[name]

    def heads(x: np.ndarray, name: str) -> np.ndarray:
        return (x @ of[f"{layer}.self_attn.{name}.weight"].T).reshape(*x.shape[:2], -1, model.head_dim)

    def rotate(x: np.ndarray) -> np.ndarray:
        half = model.head_dim // 2
        angles = np.outer(np.arange(length), model.rope_theta ** (-np.arange(half) / half))
        angles = np.concatenate([angles, angles], axis=-1)[:, None]
        return x * np.cos(angles) + np.concatenate([-x[..., half:], x[..., :half]], axis=-1) * np.sin(angles)

    layer, shared = "model.layers.0", model.num_heads // model.num_kv_heads
    hidden = of["model.embed_tokens.weight"][block[:, :-1]]
    x = normalise(hidden, f"{layer}.input_layernorm.weight")
    queries, keys = rotate(heads(x, "q_proj")), rotate(heads(x, "k_proj")).repeat(shared, 2)
    scores = np.einsum("bthk,bshk->bhts", queries, keys) / np.sqrt(model.head_dim)
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    attention = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    attended = np.einsum("bhts,bshk->bthk", attention, heads(x, "v_proj").repeat(shared, 2))
    hidden = hidden + attended.reshape(hidden.shape) @ of[f"{layer}.self_attn.o_proj.weight"].T
    x = normalise(hidden, f"{layer}.post_attention_layernorm.weight")
    gate, up = (x @ of[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ of[f"{layer}.mlp.down_proj.weight"].T
    logits = normalise(hidden, "model.norm.weight") @ of["model.embed_tokens.weight"].T
    targets = np.take_along_axis(logits, block[:, 1:, None], axis=-1)[..., 0]
    return float((np.log(np.exp(logits).sum(-1)) - targets).mean())


def test_the_reference_loss_is_that_of_llamas_definition(tmp_path):
    config = tiny_config()
    reference = write_reference(config, tmp_path / "weights.npz")
    with np.load(tmp_path / "weights.npz") as weights:
        assert reference["loss"] == pytest.approx(llama_loss(weights, weights["block"], config), rel=1e-5)


def test_sides_take_turns_and_the_medians_are_compared():
    speeds = {"ours": iter([1.0, 9.0, 4.0]), "PyTorch eager": iter([3.0, 1.0, 2.0])}
    order: list[str] = []

    def side(name: str):
        def run() -> dict[str, Any]:
            order.append(name)
            return {"tokens_per_second": next(speeds[name]), "dtype": "float32", "process_bytes": 5}

        return run

    taken = peer_rounds._alternate({name: side(name) for name in speeds}, 3, lambda line: None)
    assert order == ["ours", "PyTorch eager"] * 3
    figures = {name: peer_rounds._speed(runs) for name, runs in taken.items()}
    assert figures["ours"]["tokens_per_second"]["median"] == 4.0
    assert figures["ours"]["dtype"] == "float32"
    assert peer_rounds._ratios(figures) == {"ours / PyTorch eager": 2.0}


def test_on_a_cpu_pytorch_runs_under_both_allocators():
    default, tuned = peer_rounds._allocators("cpu").values()
    assert tuned == TUNED_MALLOC
    assert default == dict.fromkeys(TUNED_MALLOC)  # removed, should the user have set them
    assert peer_rounds._allocators("gpu") == {"": {}}


def test_on_a_cpu_pytorch_compiles_in_one_thread():
    on_cpu, on_gpu = (peer_rounds._compile_caches("folder", platform) for platform in ("cpu", "gpu"))
    assert on_cpu == {**on_gpu, "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def test_what_the_peer_cannot_express_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    require_peer(tiny_config())
    with pytest.raises(UserError, match=r"model.dropout=0.1"):
        require_peer(tiny_config(dropout=0.1))
    with_muon = dataclasses.replace(tiny_config().optim, muon_learning_rate=0.01)
    with pytest.raises(UserError, match=r"optim.muon_learning_rate=0.01"):
        require_peer(dataclasses.replace(tiny_config(), optim=with_muon))


@needs_torch
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_the_peer_gives_our_loss(tmp_path: Path, tie_embeddings):
    from tinystories_jax.analysis import peer

    config = tiny_config(tie_embeddings=tie_embeddings)
    ours = write_reference(config, tmp_path / "weights.npz")
    theirs = peer.compute_reference(config, tmp_path / "weights.npz", "cpu")
    assert theirs["num_params"] == ours["num_params"]
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)


@needs_torch
def test_the_peer_learns(tmp_path: Path):
    from tinystories_jax.analysis import peer

    config = tiny_config()
    write_reference(config, tmp_path / "weights.npz")
    run = peer._TrainingRun(config, 4, False, tmp_path / "weights.npz", "cpu")
    block = peer._load(config, tmp_path / "weights.npz", "cpu")[1]
    before = peer._loss(run._model, block).detach().item()
    assert run.run(10) > 0
    assert peer._loss(run._model, block).detach().item() < before


@needs_torch
def test_a_pytorch_without_the_gpu_that_jax_has_is_refused(tmp_path: Path, monkeypatch):
    from tinystories_jax.analysis import peer

    monkeypatch.setattr(peer.torch.cuda, "is_available", lambda: False)
    config = tiny_config()
    write_reference(config, tmp_path / "weights.npz")
    with pytest.raises(UserError, match=r"PyTorch .* sees none; install a PyTorch built for CUDA 12"):
        peer.time_decoding(config, 1, 0.0, tmp_path / "weights.npz", "gpu")


@needs_torch
@pytest.mark.slow
def test_both_sides_are_compared_in_processes_of_their_own(monkeypatch):
    monkeypatch.delenv("JAX_NUMPY_RANK_PROMOTION")
    monkeypatch.setattr(peer_rounds, "_DECODE_ROWS", (2,))
    monkeypatch.setattr(peer_rounds, "_allocators", lambda platform: {"": {}})  # one is enough
    config = tiny_config()
    trained = compare_training(config, 2, "cpu", 1, 0.0, print)
    assert set(trained["sides"]) == {"ours", "PyTorch eager", "PyTorch compiled"}
    assert set(trained["ratios"]) == {"ours / PyTorch eager", "ours / PyTorch compiled"}
    decoded = compare_decoding(config, "cpu", 1, 0.0, print)
    assert set(decoded["batch 2"]["ratios"]) == {"ours / PyTorch eager"}
    for name, figures in (("train_peer", trained), ("decode_peer", decoded)):
        table = format_section({name: figures})
        assert "ours / PyTorch eager" in table
        assert table.count("float32") == (2 if name == "decode_peer" else 3)
