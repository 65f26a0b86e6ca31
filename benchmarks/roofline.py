"""The measured points under the measured roof."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def draw(rows: Sequence[Any], path: str) -> None:
    """Writes the roofline plot of `harness.Row`s to a PNG or SVG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r.work and r.rounds.get("ours") and r.work[0] > 0 and r.work[1] > 0]
    if not rows:
        return
    roof = {k: max(r.roof[k] for r in rows) for k in rows[0].roof}
    intensity = np.geomspace(2.0**-5, 2.0**10, 200)
    figure, axes = plt.subplots(figsize=(9, 6))
    axes.plot(
        intensity, np.minimum(roof["gflops"], roof["read_gbs"] * intensity), "k-", label=f"memory {roof['read_gbs']:.0f} GB/s"
    )
    cache = max(v for k, v in roof.items() if k.isdigit())
    axes.plot(intensity, np.minimum(roof["gflops"], cache * intensity), "k:", label=f"cache {cache:.0f} GB/s")
    axes.axhline(roof["gflops"], color="0.8", zorder=0)
    axes.text(intensity[-1], roof["gflops"] * 1.05, f"{roof['gflops']:.0f} GFLOP/s float32", ha="right")
    for i, op in enumerate(dict.fromkeys(r.op for r in rows)):
        color = plt.cm.tab20(i % 20)
        for name, marker in (("ours", "o"), ("torch", "x")):
            points = [
                (r.work[0] / r.work[1], r.work[0] / min(r.rounds[name]) / 1e9) for r in rows if r.op == op and r.rounds.get(name)
            ]
            if points:
                label = op if name == "ours" else None
                axes.plot(*zip(*points, strict=True), marker, color=color, label=label, linestyle="none")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte",
        ylabel="GFLOP/s",
        title="fastlm (o) and torch (x) under this machine's roof",
    )
    axes.legend(fontsize="small", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
