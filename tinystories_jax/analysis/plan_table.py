"""A plan as one screen of text; every figure is one of `plan.py`."""

import math
import textwrap

from tinystories_jax.analysis.plan import Corpus, Plan

_Row = tuple[str, str, str, str]  # title, figure, unit, note
_LINE_WIDTH = 120


def format_plan(plan: Plan) -> str:
    """Returns the plan as a table of at most 40 lines."""
    corpus = plan.corpus
    tokens = "" if corpus.num_tokens is None else f"{_about(corpus.is_estimate).format(corpus.num_tokens)} tokens, "
    rows = [*_size_rows(plan), *_work_rows(plan), *_measured_rows(plan)]
    return "\n".join(
        [
            f"{'device':<24}{plan.device}",
            f"{'data':<24}{tokens}{corpus.origin}",
            *(f"{title:<24}{figure:>17} {unit:<9} {note}".rstrip() for title, figure, unit, note in rows),
            *_gpu_lines(plan),
        ]
    )


def _size_rows(plan: Plan) -> list[_Row]:
    parameters, state = plan.parameters, plan.state
    kept = "the latest, that of a stop, the best, ends of epochs"
    if state.max_checkpoints is not None:
        kept = f"at most {state.max_checkpoints:,}: {kept}"
    embedding = f"vocabulary of {plan.corpus.vocab_size:,}"
    if not parameters.output_matrix:
        embedding += ", also the output matrix"
    rows = [
        ("parameters", f"{parameters.total:,}", "", "float32"),
        ("  embedding", f"{parameters.embedding:,}", "", embedding),
        ("  layers", f"{parameters.layers:,}", "", "norm scales included"),
        ("training state", *_si(state.total_bytes, "B"), ""),
        ("  parameters", *_si(state.parameters_bytes, "B"), ""),
        ("  optimizer's moments", *_si(state.moments_bytes, "B"), ""),
        ("  accumulated gradient", *_si(state.accumulated_gradient_bytes, "B"), ""),
        ("a checkpoint on disk", *_si(state.total_bytes, "B"), "the training state, before compression"),
        ("all checkpoints kept", *_si(state.max_checkpoints_bytes, "B"), kept),
        ("token caches on disk", *_caches_size(plan.corpus), "of both splits; other runs share them"),
    ]
    if parameters.output_matrix:
        rows.insert(3, ("  output matrix", f"{parameters.output_matrix:,}", "", ""))
    return rows


def _caches_size(corpus: Corpus) -> tuple[str, str]:
    size, unit = _si(corpus.caches_bytes, "B")
    return ("about " if corpus.is_estimate else "") + size, unit


def _work_rows(plan: Plan) -> list[_Row]:
    work, flops = plan.work, plan.flops
    about, about_total = _about(plan.corpus.is_estimate), _about(work.updates_are_estimate)
    micro_batches = f"{work.micro_batches_per_update:,} micro-batch{'es' * (work.micro_batches_per_update > 1)}"
    blocks = f"{_count(work.blocks_per_epoch, about)} blocks"
    batch = f"{work.rows_per_micro_batch:,} rows of {work.sequence_length:,}"
    total = f"{_count(work.training_tokens, about_total)} tokens"
    warmup = f"{_count(work.epochs, '{:,.2f}')} epochs; warm-up: {_count(work.warmup_updates)} updates"
    return [
        ("tokens per micro-batch", f"{work.tokens_per_micro_batch:,}", "", batch),
        ("tokens per update", f"{work.tokens_per_update:,}", "", micro_batches),
        ("tokens per epoch", _count(work.tokens_per_epoch, about), "", blocks),
        ("updates", _count(work.updates, about_total), "", warmup),
        ("FLOPs per token", *_si(flops.per_token_flops, "FLOP"), "forward and backward"),
        ("  matrices of layers", *_si(flops.layers_per_token_flops, "FLOP"), "6 x parameters"),
        ("  attention", *_si(flops.attention_per_token_flops, "FLOP"), "6 x context x width x layers: causal, half"),
        ("  logits", *_si(flops.logits_per_token_flops, "FLOP"), "6 x vocabulary x width"),
        ("FLOPs of the training", *_si(flops.training_flops, "FLOP"), total),
    ]


def _measured_rows(plan: Plan) -> list[_Row]:
    found, here = plan.measurement, plan.here
    if found is None or here is None:
        return [("memory, minutes here", "not measured", "", plan.not_measured)]
    memory, all_rows = found.memory, plan.work.rows_per_micro_batch
    parts = {
        "arguments": memory.arguments_bytes,
        "temporaries": memory.temporaries_bytes,
        "outputs": memory.outputs_bytes,
        "of them new": memory.outputs_bytes - memory.aliased_bytes,
    }
    split = ", ".join(f"{' '.join(_si(size, 'B'))} {name}" for name, size in parts.items())
    whole, timed = "all rows of a micro-batch", f"median of {found.num_samples:,} samples"
    if found.rows < all_rows:
        whole = f"{' '.join(_si(plan.micro_batch_memory_bytes, 'B'))} for {all_rows:,} rows, in proportion"
        timed += f"; scaled by tokens to {all_rows:,} rows"
    return [
        (f"memory, {found.rows:,} rows", *_si(memory.total_bytes, "B"), whole),
        (f"  by XLA's analysis: {split}", "", "", ""),
        ("compile time", f"{found.compile_seconds:.1f}", "s", "not part of what follows"),
        (f"micro-step, {found.rows:,} rows", _figure(found.micro_step_seconds), "s", timed),
        ("speed here", f"{found.tokens_per_second:,.0f}", "tokens/s", f"MFU: {_percent(found.mfu)}"),
        ("time here", _figure(here.training_seconds, 60), "minutes", _in_seconds_and_hours(here.training_seconds)),
    ]


def _gpu_lines(plan: Plan) -> list[str]:
    times = f"{'seconds':>12}{'minutes':>12}{'hours':>10}"
    lines = [f"{'GPU':<10}{'bf16 TFLOP/s':>14}{'tokens/s':>14}{'ms per update':>15}{times}"]
    for gpu in plan.gpus:
        peak = (gpu.peak_flops_per_second or 0) / 1e12
        seconds, minutes, hours = (_figure(gpu.training_seconds, unit) for unit in (1, 60, 3600))
        lines.append(
            f"{gpu.device:<10}{peak:>14,.1f}{gpu.tokens_per_second:>14,.0f}{_figure(gpu.update_seconds, 1e-3):>15}"
            f"{seconds:>12}{minutes:>12}{hours:>10}"
        )
    epochs = plan.work.epochs
    instead = "" if epochs is None or round(epochs, 2) == 5 else f" instead of {epochs:,.2f}"
    costs = {"here": plan.here.five_epochs_seconds} if plan.here else {}
    costs |= {times.device: times.five_epochs_seconds for times in plan.gpus}
    unit, size = ("hours", 3600) if max(seconds or math.inf for seconds in costs.values()) >= 60 else ("seconds", 1)
    listed = ", ".join(f"{device} {_figure(seconds, size)}" for device, seconds in costs.items())
    return [
        *lines,
        f"MFU {plan.mfu:.1%}: {plan.mfu_origin}.",
        f"Peaks: {plan.peak_source} (SXM).",
        "Times: training steps alone, no evaluation, samples, checkpoints, data; float32 reaches little of the peaks.",
        textwrap.fill(f"Cost at 5 epochs{instead}, {unit}: {listed}", _LINE_WIDTH, subsequent_indent="  "),
    ]


def _in_seconds_and_hours(seconds: float | None) -> str:
    return f"{_figure(seconds)} seconds, {_figure(seconds, 3600)} hours"


def _percent(share: float | None) -> str:
    return "unknown device" if share is None else f"{share:.1%}"


def _about(is_estimate: bool) -> str:
    return "about {:,}" if is_estimate else "{:,}"


def _count(value: float | None, form: str = "{:,}") -> str:
    return "unknown" if value is None else form.format(value)


def _figure(value: float | None, unit: float = 1) -> str:
    """Returns `value` in units of `unit` to three digits, but no more than three decimals."""
    if value is None:
        return "unknown"
    decimals = min(max(0, 2 - math.floor(math.log10(value / unit))), 3)
    return f"{value / unit:,.{decimals}f}"


def _si(value: float | None, unit: str) -> tuple[str, str]:
    """Returns figure and unit, with the prefix that leaves one to three digits before the point."""
    if value is None:
        return "unknown", ""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.95 or prefix == "P":
            return f"{value:,.1f}", prefix + unit
        value /= 1000
    raise AssertionError("the loop ends with P")
