"""The figures of `run.py` as text: a section at a time, every figure as it stands in the JSON."""

from typing import Any

_WIDTH = 30
_IDLE_LOAD = 0.5
_STATES = ("cold", "hot")  # of the system's memory of a file


def format_section(figures: dict[str, Any]) -> str:
    """Returns the section that was measured last."""
    name = next(reversed(figures))
    if name == "config":
        return _format_machine(figures["machine"])
    return "\n".join(["", name.replace("_", ", ").upper(), *_FORMATS[name](figures[name])])


def _format_machine(machine: dict[str, Any]) -> str:
    settings = " ".join(f"{name}={value}" for name, value in machine["settings"].items())
    cores, memory = machine["cpu_cores"], machine["memory_bytes"] / 2**30
    busy = f", above {_IDLE_LOAD}: other programs ran, which do not slow all sides alike"
    return "\n".join(
        [
            _row("date", machine["date"]),
            _row("command", machine["command"]),
            _row("device", f"{machine['num_devices']} x {machine['device']}"),
            _row("host", f"{machine['cpu']}, {cores} cores, {memory:.0f} GiB; {machine['system']}"),
            _row("load before", f"{machine['load_before']:.2f}{busy * (machine['load_before'] > _IDLE_LOAD)}"),
            _row("versions", ", ".join(f"{name} {value}" for name, value in machine["versions"].items())),
            _row("settings", settings or "none"),
            "Figures: median (least to greatest; number of samples).",
        ]
    )


def _format_train(train: dict[str, Any]) -> list[str]:
    roof, memory, flash = train["roofline"], train["peak_memory"], train["flash_attention"]
    shape = f"{train['rows']} x {train['sequence_length']}"
    # Of a GPU's program XLA sees no bytes in calls of other libraries either.
    at_least = "" if flash["calls_in_hlo"] is None else "at least "
    calls = "not on this device" if flash["calls_in_hlo"] is None else f"{flash['calls_in_hlo']} calls in the HLO"
    rates = ", ".join(
        f"{dtype} {_spread(rate, 'TFLOP/s', 1e12, 2)}" for dtype, rate in train["matmul_flops_per_second"].items()
    )
    return [
        _row("model", f"{train['num_params']:,} parameters, {train['dtype']}"),
        _row("compile time", f"{train['compile_seconds']:.1f} s, not part of what follows"),
        _row(f"micro-step of {shape}", f"{_milliseconds(train['micro_step_seconds'])}"),
        _row("update", f"{_milliseconds(train['update_seconds'])}; micro-steps: {train['micro_steps_per_update']}"),
        _row("speed", f"{_rate(train['tokens_per_second'])}"),
        _row("FLOPs per token", f"{train['flops_per_token'] / 1e6:,.1f} M = {train['flops_formula']}"),
        _row("MFU", _mfu(train["mfu"])),
        _row("waiting for data", f"{train['data_wait_fraction']:.2%} of the time, at most"),
        _row(
            "peak memory",
            f"{_gigabytes(memory['planned_bytes'])} planned by XLA, {_gigabytes(memory['device_bytes'])} given by the "
            f"device's allocator, {_gigabytes(memory['process_bytes'])} resident in the process",
        ),
        _row("cuDNN flash attention", f"expected: {'yes' if flash['expected'] else 'no'}; {calls}"),
        _row("memory bandwidth", f"{_spread(train['copy_bytes_per_second'], 'GB/s', 1e9)}, a copy, read and written"),
        _row("matmul rate", rates),
        _row(
            "micro-step, counted by XLA",
            f"{roof['counted_flops'] / 1e9:,.1f} GFLOP ({roof['counted_flops'] / roof['formula_flops']:.3f} x the "
            f"formula), {at_least}{roof['counted_bytes'] / 1e9:,.2f} GB",
        ),
        _row(
            "  at these rates",
            f"{roof['compute_seconds'] * 1e3:,.1f} ms for its FLOPs, "
            f"{at_least}{roof['memory_seconds'] * 1e3:,.1f} ms for its bytes",
        ),
        _row("  bound", f"{roof['bound']}; {roof['reached']:.1%} of it reached"),
    ]


def _format_decode(decode: dict[str, Any]) -> list[str]:
    lines = [_row("activations", decode["dtype"])]
    for batch in decode["batches"]:
        lines.append(
            _row(
                f"batch {batch['rows']}, {batch['new_tokens']} tokens",
                f"{_rate(batch['tokens_per_second'])} in all, {_milliseconds(batch['token_seconds'], 3)} "
                f"a step; matrices in {batch['matrix_form']}; compile time {batch['compile_seconds']:.1f} s",
            )
        )
    for first in decode["first_token"]:
        lines.append(
            _row(
                f"first token, prompt of {first['prompt_length']:,}",
                f"{_milliseconds(first['seconds'])}; compile time {first['compile_seconds']:.1f} s",
            )
        )
    return [*lines, *_format_positions(decode["positions"])]


def _format_positions(positions: list[dict[str, Any]]) -> list[str]:
    """Returns the first, the middle, the last and the slowest part, and how much slower that is than the first."""
    slowest = max(range(len(positions)), key=lambda index: positions[index]["against_first"])
    shown = [positions[index] for index in sorted({0, len(positions) // 2, len(positions) - 1, slowest})]
    lines = [
        _row(f"token at {part['first']:,} to {part['last']:,}", f"{_milliseconds(part['token_seconds'], 3)}")
        for part in shown
    ]
    return [*lines, _row("  slowest against first part", f"{positions[slowest]['against_first'] - 1:+.1%}")]


def _format_data(data: dict[str, Any]) -> list[str]:
    cache, trained = data["cache"], data["training_seconds"]
    lines = [
        _row("stories", f"{data['stories']}, {data['encode']['bare']['num_bytes'] / 1e6:,.1f} MB"),
        _row(
            "tokenizer", f"{data['vocab_size']:,} tokens" + (f", trained in {trained:.1f} s" if trained else ", given")
        ),
    ]
    for title, side in (("encoding, stories to cache", "pipeline"), ("encode_batch_fast alone", "bare")):
        figures = data["encode"][side]
        resident = f"{_gigabytes(figures['process_bytes'])} resident at most"
        lines.append(_row(title, f"{_spread(figures['bytes_per_second'], 'MB/s', 1e6, 2)}; {resident}"))
    return [
        *lines,
        _row("  ratio", f"{data['ratio']:.3f}"),
        *(
            _row(title, ", ".join(f"{cache[f'open_{state}_seconds'][end] * 1e3:,.1f} ms {state}" for state in _STATES))
            for end, title in (
                ("open", f"opening {cache['num_bytes'] / 1e9:,.2f} GB"),
                ("verified", "  until every byte is verified"),
            )
        ),
        _row(
            f"batch_at, {cache['rows']} x {cache['row_length']}, hot",
            f"{_milliseconds(cache['batch_hot_seconds'], 3)}",
        ),
        _row("  cold", f"{_milliseconds(cache['batch_cold_seconds'], 3)}"),
        _row("  order of an epoch", f"{cache['shuffle_seconds'] * 1e3:,.1f} ms, once an epoch"),
    ]


def _format_start(start: dict[str, Any]) -> list[str]:
    lines = [_row("stories", f"{start['stories']}; an update is {start['rows']} rows")]
    for doctor in (name for name in ("nodoctor", "doctor") if name in start):
        totals = {}
        for name in ("first", "second"):
            phases = dict(start[doctor][name])
            total = phases.pop("total")
            totals[name] = total["median"]
            parts = ", ".join(f"{phase.replace('_', ' ')} {took['median']:.1f}" for phase, took in phases.items())
            lines.append(_row(f"{name} start, --{doctor}", f"{_spread(total, 's')}: {parts}"))
        lines.append(_row("  second / first", f"{totals['second'] / totals['first']:.2f}"))
    return lines


def _format_growth(growth: dict[str, Any]) -> list[str]:
    lines = []
    for axis, points in growth["axes"].items():
        for point in points:
            took = f"{_milliseconds(point['seconds'])}, {point['flops'] / 1e9:,.1f} GFLOP"
            lines.append(_row(f"{axis}: {point['shape']}", f"{took}, {point['deviation']:+.1%} from linear", 48))
    return [*lines, *_format_positions(growth["positions"])]


def _format_peer(peer: dict[str, Any]) -> list[str]:
    """Returns training or decoding beside PyTorch; the ratios last."""
    losses = peer["first_loss"]
    lines = [
        _row(
            "same function",
            f"{peer['num_params']:,} parameters each; loss of the same parameters on the same tokens: "
            f"ours {losses['ours']:.6f}, PyTorch {losses['PyTorch']:.6f}",
        )
    ]
    parts = {"": peer} if "sides" in peer else {name: part for name, part in peer.items() if name.startswith("batch")}
    for name, part in parts.items():
        for side, figures in part["sides"].items():
            lines.append(_row(" ".join(filter(None, (name, side))), _speed(figures), 48))
    for name, part in parts.items():
        for sides, ratio in part["ratios"].items():
            lines.append(_row(" ".join(filter(None, (name, sides))), f"{ratio:.2f}", 72))
    return lines


def _speed(figures: dict[str, Any]) -> str:
    speed = f"{_rate(figures['tokens_per_second'])}, {figures['dtype']}"
    if "compile_seconds" in figures:
        speed += f", compile time {figures['compile_seconds']:.1f} s"
    if figures.get("process_bytes"):
        speed += f", {_gigabytes(figures['process_bytes'])} resident"
    if figures.get("device_bytes"):
        speed += f", {_gigabytes(figures['device_bytes'])} on the device"
    return speed


_FORMATS = {
    "train": _format_train,
    "train_peer": _format_peer,
    "decode": _format_decode,
    "decode_peer": _format_peer,
    "data": _format_data,
    "start": _format_start,
    "growth": _format_growth,
}


def _row(title: str, text: str, width: int = _WIDTH) -> str:
    return f"{title:<{width}} {text}"


def _spread(spread: dict[str, float], unit: str, size: float = 1.0, decimals: int = 1) -> str:
    """Returns the spread in units of `size`."""
    median, least, greatest = (f"{spread[name] / size:,.{decimals}f}" for name in ("median", "min", "max"))
    return f"{median} {unit} ({least} to {greatest}; {spread['num_samples']})"


def _rate(spread: dict[str, float]) -> str:
    return _spread(spread, "tokens/s", decimals=0)


def _milliseconds(spread: dict[str, float], decimals: int = 1) -> str:
    return _spread(spread, "ms", 1e-3, decimals)


def _mfu(share: float | None) -> str:
    return "unknown: no peak known for this device" if share is None else f"{share:.1%} of the dense bf16 peak"


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:,.2f} GB"
