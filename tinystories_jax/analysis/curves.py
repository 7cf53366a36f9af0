"""The part of a report that shows training itself: loss, learning rate, gradient norm, speed."""

from statistics import median

import numpy as np

from tinystories_jax.analysis.page import figure, figures, paragraph, section
from tinystories_jax.analysis.plots import Axis, Curve, draw, smooth, thin_out
from tinystories_jax.analysis.run_files import RunFiles

_UPDATE = Axis("update")


def show_curves(run: RunFiles) -> str:
    """Returns the section with the five curves, saying of each that cannot be drawn why."""
    if not run.rows:
        return section("Training", paragraph("metrics.jsonl has no update yet."))
    rate = draw(
        "rate",
        "Learning rate over updates",
        [Curve(*thin_out(*run.series("update", "train/learning_rate")), 1)],
        x=_UPDATE,
        y=Axis("", low=0.0),
    )
    warm_up = f"{run.schedule.warmup_updates:,} updates of warm-up, then a cosine"
    if run.config.optim.muon_learning_rate:
        ratio = run.config.optim.muon_learning_rate / run.config.optim.learning_rate
        warm_up += f"; AdamW's, Muon's is {ratio:.3g} times as high"
    curves = (*_losses(run), figure("Learning rate", rate, note=warm_up), _gradient_norm(run), _speed(run))
    return section("Training", figures(*curves))


def _losses(run: RunFiles) -> tuple[str, str]:
    updates, losses = run.series("update", "train/loss")
    valid_updates, valid_losses = run.series("update", "valid/loss")
    key = [("series-1", "training"), ("series-2", "validation")]

    def plot(name: str, axis: Axis, x: list[float], valid_x: list[float]) -> str:
        label = f"{valid_losses[-1]:.3f}" if valid_losses else ""
        curves = [
            Curve(*thin_out(x, losses), 1, "faint"),
            Curve(*thin_out(x, smooth(losses)), 1),
            Curve(valid_x, valid_losses, 2, "points", label),
        ]
        title = f"Loss over {name}"
        drawn = draw(f"loss-by-{axis.label}", title, curves, x=axis, y=Axis("", log=True))
        return figure(title, drawn, note="nats per token", key=key)

    by_update = plot("updates", _UPDATE, updates, valid_updates)
    looked_at, seconds = run.series("update", "seconds")
    if not seconds:
        missing = paragraph("The rows of metrics.jsonl have no seconds, so this curve cannot be drawn.")
        return by_update, figure("Loss over wall time", missing)
    unit, length = ("hours", 3600) if seconds[-1] > 2 * 3600 else ("minutes", 60)
    # The clock is read every few updates; those between were as long as each other.
    times, valid_times = (list(np.interp(x, looked_at, seconds) / length) for x in (updates, valid_updates))
    return by_update, plot("wall time", Axis(unit), times, valid_times)


def _gradient_norm(run: RunFiles) -> str:
    limit = run.config.optim.max_grad_norm
    updates, norms = run.series("update", "train/grad_norm")
    curves = [Curve(*thin_out(updates, norms), 1, "faint"), Curve(*thin_out(updates, smooth(norms)), 1)]
    clipped = sum(norm > limit for norm in norms)
    if clipped:
        curves.append(Curve([0.0], [limit], 2, "level"))
    note = (
        f"clipped to {limit:g} in {clipped / len(norms):.1%} of updates" if clipped else f"never clipped to {limit:g}"
    )
    drawn = draw("norm", "Gradient norm over updates", curves, x=_UPDATE, y=Axis("", log=True))
    return figure("Gradient norm", drawn, note=note)


def _speed(run: RunFiles) -> str:
    updates, speeds = run.series("update", "train/tokens_per_second")
    if not speeds:
        return figure("Tokens per second", paragraph("Not measured yet."))
    drawn = draw("speed", "Tokens per second", [Curve(*thin_out(updates, speeds), 1)], x=_UPDATE, y=Axis("", low=0.0))
    waited = run.series("update", "train/data_wait_fraction")[1]
    note = f"waiting for data at most {median(waited):.1%} of the time" if waited else ""
    return figure("Tokens per second", drawn, note=note)
