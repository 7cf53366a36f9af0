"""FLOPs by hand, MFU only where the peak is known."""

import dataclasses

import jax

from tests.tiny import make_tiny_config
from tinystories_jax.config import ModelConfig
from tinystories_jax.training.flops import (
    PEAK_BF16_FLOPS,
    flops_per_token,
    model_flops_utilization,
    split_flops_per_token,
)

TOP10K = ModelConfig(
    d_model=448,
    num_layers=7,
    num_heads=7,
    num_kv_heads=7,
    d_ff=1344,
    rope_theta=10_000.0,
    tie_embeddings=True,
    dropout=0.0,
    dtype="bfloat16",
    remat=False,
    head_dim=64,
    vocab_size=10_000,
)


def test_flops_per_token_by_hand():
    assert flops_per_token(TOP10K, 512) == 6 * 22_750_784 + 6 * 512 * 448 * 7
    untied = dataclasses.replace(TOP10K, tie_embeddings=False)
    assert flops_per_token(untied, 512) == flops_per_token(TOP10K, 512)


def test_flops_split_by_hand():
    norms = (2 * 7 + 1) * 448
    layers = 7 * (4 * 448 * 448 + 3 * 448 * 1344) + norms
    split = split_flops_per_token(TOP10K, 512)
    assert split == (6 * layers, 6 * 512 * 448 * 7, 6 * 10_000 * 448)
    assert sum(split) == flops_per_token(TOP10K, 512)
    assert split_flops_per_token(dataclasses.replace(TOP10K, tie_embeddings=False), 512) == split


def test_mfu_of_an_unknown_device_is_none(monkeypatch):
    monkeypatch.delitem(PEAK_BF16_FLOPS, jax.devices()[0].device_kind, raising=False)
    assert model_flops_utilization(1e6, flops_per_token(make_tiny_config().model, 16)) is None
