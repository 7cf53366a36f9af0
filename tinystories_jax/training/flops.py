"""The FLOPs that training takes, by formula, and the share of a device's peak that is reached (MFU)."""

from typing import NamedTuple

import jax

from tinystories_jax.config import ModelConfig
from tinystories_jax.model.transformer import num_params

PEAK_SOURCE = "dense bf16 with float32 accumulation, from NVIDIA's data sheets and architecture white papers"
# Peaks in FLOP/s (H100/H200: 989.4 for SXM; PCIe 756, NVL 835; Ada: 165.2 for the RTX 4090; Blackwell: 209.5 for the
# RTX 5090). By the exact name that the driver reports: "RTX 4090" is also part of "RTX 4090 Laptop GPU", another chip.
PEAK_BF16_FLOPS = {
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
}


class TokenFlops(NamedTuple):
    """The FLOPs of one training token by where they are spent."""

    layers: float
    attention: float
    logits: float


def split_flops_per_token(model: ModelConfig, sequence_length: int) -> TokenFlops:
    """Returns the FLOPs of one training token: 6 per parameter of layers and output matrix, and causal attention.

    6 N: 2 forward, 4 backward (Kaplan et al. 2020, arXiv:2001.08361). Attention: two matmuls of half the square, so
    6 x sequence_length x width per layer. An embedding that is not also the output matrix is a look-up, not a matmul.
    """
    output_matrix = model.vocab_size * model.d_model
    in_layers = num_params(model) - output_matrix * (1 if model.tie_embeddings else 2)
    attention = 6.0 * sequence_length * model.num_heads * model.head_dim * model.num_layers
    return TokenFlops(layers=6.0 * in_layers, attention=attention, logits=6.0 * output_matrix)


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Returns the FLOPs of one training token, the sum of `split_flops_per_token`."""
    return sum(split_flops_per_token(model, sequence_length))


def model_flops_utilization(tokens_per_second: float, flops_per_token: float) -> float | None:
    """Returns the share of the device's dense bf16 peak, None for a device whose peak is not in the table."""
    peak = PEAK_BF16_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else tokens_per_second * flops_per_token / peak
