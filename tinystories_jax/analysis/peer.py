"""What a user would pick instead: Hugging Face's LlamaForCausalLM and AdamW in PyTorch, in the shapes of a config.

The one module that imports PyTorch. The benchmark runs it in processes of its own, in which there is no JAX.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]
from transformers import LlamaConfig, LlamaForCausalLM

from tinystories_jax.analysis.benchmark.child import peak_resident_bytes
from tinystories_jax.analysis.benchmark.inputs import PROMPT_LENGTH, num_new_tokens, synthetic_tokens
from tinystories_jax.analysis.timing import spread_of, take_samples, time_repeated
from tinystories_jax.config import Config
from tinystories_jax.data.cache import micro_batch_at
from tinystories_jax.errors import UserError
from tinystories_jax.processor import multiplies_bfloat16


def compute_reference(config: Config, path: Path, platform: str) -> dict[str, Any]:
    """Returns the peer's count of parameters and its float32 loss on what `write_reference` has written.

    `platform`, here and below, is what JAX calls that of its own device. Raises `UserError` where PyTorch has none.
    """
    model, block = _load(config, path, platform)
    with torch.no_grad():
        loss = _loss(model, block)
    return {"num_params": sum(weight.numel() for weight in model.parameters()), "loss": loss.item()}


def time_training(
    config: Config, rows: int, seconds: float, compiled: bool, path: Path, platform: str
) -> dict[str, Any]:
    """Returns what ours does: seconds of compiling, and the median of tokens per second.

    bf16 by autocast; the strongest of PyTorch's AdamW, `fused`.
    """
    run = _TrainingRun(config, rows, compiled, path, platform)
    first_seconds = run.run(1)
    took = time_repeated(run.run, seconds=seconds, at_least=1)
    tokens = rows * config.data.sequence_length * config.train.grad_accum_steps
    return {
        "dtype": _dtype(config, platform),
        "compile_seconds": max(first_seconds - took.median, 0.0),
        "tokens_per_second": tokens / took.median,
        "device_bytes": torch.cuda.max_memory_allocated() if platform == "gpu" else None,
        "process_bytes": peak_resident_bytes(),
    }


def time_decoding(config: Config, rows: int, seconds: float, path: Path, platform: str) -> dict[str, Any]:
    """Returns tokens per second of `generate` with its KV cache, as ours does: same prompt, same count of tokens."""
    torch.set_float32_matmul_precision("high")  # TF32, which JAX uses by default, too
    model = _load(config, path, platform)[0].eval()
    model = model.to(getattr(torch, _dtype(config, platform)))  # type: ignore[arg-type]
    new_tokens = num_new_tokens(config)
    prompt = torch.arange(PROMPT_LENGTH, device=model.device).repeat(rows, 1) % config.model.vocab_size
    sampling: dict[str, Any] = {"do_sample": False}
    if config.sample.temperature:
        sampling = {"do_sample": True, "temperature": config.sample.temperature, "top_k": 0}

    def write() -> float:
        began = time.perf_counter()
        texts = model.generate(  # type: ignore[misc]
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            use_cache=True,
            **sampling,
        )
        texts.cpu()
        assert texts.shape[1] == PROMPT_LENGTH + new_tokens
        return time.perf_counter() - began

    write()
    took = spread_of(take_samples(write, seconds=seconds, at_least=1))
    return {
        "dtype": _dtype(config, platform),
        "tokens_per_second": rows * new_tokens / took.median,
    }


class _TrainingRun:
    def __init__(self, config: Config, rows: int, compiled: bool, path: Path, platform: str):
        torch.set_float32_matmul_precision("high")
        self._config, self._rows = config, rows
        self._dtype = _dtype(config, platform)
        self._model, block = _load(config, path, platform)
        self._device = block.device
        self._loss = torch.compile(_loss) if compiled else _loss
        self._tokens, self._micro_step = synthetic_tokens(config), 0
        optim, weights = config.optim, list(self._model.parameters())
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": optim.weight_decay},
                {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
            ],
            lr=optim.learning_rate,
            betas=(optim.beta1, optim.beta2),
            fused=True,
        )

    def run(self, num_updates: int) -> float:
        """Returns the seconds of that many updates, blocks included, until the device has finished the last."""
        began = time.perf_counter()
        for _ in range(num_updates):
            self._update()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def _update(self) -> None:
        config, micro_steps = self._config, self._config.train.grad_accum_steps
        for _ in range(micro_steps):
            block = micro_batch_at(self._tokens, config, self._micro_step, num_rows=self._rows)
            self._micro_step += 1
            on_device = torch.from_numpy(block).to(self._device, torch.int64)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._dtype == "bfloat16"):
                loss = self._loss(self._model, on_device)
            (loss / micro_steps).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), config.optim.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def _load(config: Config, path: Path, platform: str) -> tuple[LlamaForCausalLM, torch.Tensor]:
    """Returns the model with our parameters, every one of them used, and the block; both on the device."""
    shape = config.model
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.d_model,
            intermediate_size=shape.d_ff,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            max_position_embeddings=config.data.sequence_length,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            tie_word_embeddings=shape.tie_embeddings,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
        )
    )
    with np.load(path) as arrays:
        weights = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "block"}
        block = torch.from_numpy(arrays["block"])
    missing = model.load_state_dict(weights, strict=False)
    # Tied, the output matrix is the embedding, which the file holds once.
    assert missing.unexpected_keys == [], missing
    assert missing.missing_keys == ["lm_head.weight"] * shape.tie_embeddings, missing
    device = _device(platform)
    return model.to(device), block.to(device, torch.int64)  # type: ignore[arg-type]


def _loss(model: LlamaForCausalLM, block: torch.Tensor) -> torch.Tensor:
    # Labels are shifted here, as ours are: one block, two views.
    logits = model(input_ids=block[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), block[:, 1:].flatten())


def _device(platform: str) -> torch.device:
    if platform == "gpu" and not torch.cuda.is_available():
        raise UserError(
            f"--peer: JAX has a GPU and PyTorch {torch.__version__} sees none; install a PyTorch built for CUDA 12, as "
            "JAX is, or give JAX_PLATFORMS=cpu to compare both on the CPU"
        )
    return torch.device("cuda" if platform == "gpu" else "cpu")


def _dtype(config: Config, platform: str) -> str:
    """Returns what the peer multiplies in: bf16 where the config asks for it and there are instructions for it."""
    # Without them PyTorch is hundreds of times slower in bf16 than in float32: nothing to compare with.
    return config.model.dtype if platform == "gpu" or multiplies_bfloat16() else "float32"
