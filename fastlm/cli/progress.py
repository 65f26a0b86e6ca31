"""What training shows: one line that changes on a terminal, plain lines elsewhere, and the loss curve."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fastlm.train import Step


class Progress:
    """Shows a `Step`: loss, held-out loss, tokens/s, share of the roof, time left."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.every = max(1, steps // 20)
        self.rate = 0.0  # tokens/s, smoothed
        self.validation: float | None = None
        self.bar: Any = None
        if sys.stdout is not None and sys.stdout.isatty():  # None where it is closed
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(BarColumn(bar_width=24), TextColumn("{task.description}"))
            self.task = self.bar.add_task("", total=steps)

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def line(self, step: Step) -> str:
        share = step.roof_share * self.rate / step.tokens_per_second
        left = step.seconds_left * step.tokens_per_second / self.rate
        held = "" if self.validation is None else f"  held-out {self.validation:.4f}"
        text = f"step {step.step:>{len(str(self.steps))}}/{step.steps}  loss {step.loss:.4f}{held}  {self.rate:,.0f} tokens/s"
        roof = f"  {share:.0%} of the roof" if step.device == "cpu" else ""
        return f"{text}{roof}  {step.memory / 1e6:,.0f} MB  {clock(left)} left" + ("  SKIPPED: not finite" if step.skipped else "")

    def show(self, step: Step) -> None:
        self.rate = step.tokens_per_second if not self.rate else 0.95 * self.rate + 0.05 * step.tokens_per_second
        if step.validation_loss is not None:
            self.validation = step.validation_loss
        if self.bar is not None:
            self.bar.update(self.task, completed=step.step, description=self.line(step))
        elif step.step % self.every == 0 or step.step in (1, self.steps) or step.skipped:
            print(self.line(step), flush=True)


def clock(seconds: float) -> str:
    """1:05, or 2:03:04."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plot(records: Sequence[Mapping[str, Any]], guess: float, path: Path) -> Path | None:
    """The loss curve as a PNG file; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], color="0.7", linewidth=0.8, label="training")
    held = [(r["step"], r["validation_loss"]) for r in records if r.get("validation_loss") is not None]
    if held:
        axes.plot(*zip(*held, strict=True), "o-", label="held-out")
    axes.axhline(guess, color="C3", linestyle="--", linewidth=1, label="guessing by token frequency")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
