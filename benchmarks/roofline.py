"""The measured points under the measured roof."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MARKS = {  # of each contestant
    "ours": "o", "torch": "x", "torch_compile": "+", "transformers": "1", "ctranslate2": "s", "onnxruntime": "D", "openvino": "^",
    "llama_cpp": "v", "ik_llama": "P",
}  # fmt: skip


def draw(records: Sequence[dict[str, Any]], path: str) -> None:
    """Writes the roofline plot of rows, as the JSON lines hold them, to a PNG or SVG file: operations over the bytes that must be read,
    under the ceilings of float32. 8-bit products may stand above them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    rows = [r for r in records if r["work"] and r["ms"].get("ours") and r["work"][0] > 0 and r["work"][1] > 0]
    if not rows:
        return
    roof = {k: max(r["roof"][k] for r in rows) for k in rows[0]["roof"]}
    points = {  # (operation, contestant) -> points
        (op, who): [
            (r["work"][0] / r["work"][1], r["work"][0] / r["ms"][who] / 1e6) for r in rows if r["op"] == op and who in r["ms"]
        ]
        for op in dict.fromkeys(r["op"] for r in rows)
        for who in MARKS
    }
    every = [p for some in points.values() for p in some]
    low, high = min(x for x, _ in every) / 2, max(max(x for x, _ in every), 100.0) * 2
    intensity = np.geomspace(low, high, 200)
    cache = max(v for k, v in roof.items() if k.isdigit())
    figure, axes = plt.subplots(figsize=(11, 7))
    memory = f"memory {roof['read_gbs']:.0f} GB/s"
    axes.plot(intensity, np.minimum(roof["gflops"], roof["read_gbs"] * intensity), "k-", label=memory)
    axes.plot(intensity, np.minimum(roof["gflops"], cache * intensity), "k:", label=f"cache {cache:.0f} GB/s")
    axes.text(high, roof["gflops"] * 1.08, f"{roof['gflops']:.0f} GFLOP/s float32 ", ha="right")
    ops = list(dict.fromkeys(op for op, _ in points))
    for (op, who), found in points.items():
        if found:
            color = plt.cm.tab20(ops.index(op) % 20)
            ours = who == "ours"
            style: dict[str, Any] = (
                {"markersize": 6, "zorder": 3} if ours else {"markersize": 4.5, "alpha": 0.75, "fillstyle": "none"}
            )
            axes.plot(*zip(*found, strict=True), MARKS[who], color=color, label=op if ours else None, linestyle="none", **style)
    seen = [who for who in MARKS if any(found for (_, w), found in points.items() if w == who)]
    marks = [
        Line2D([], [], marker=MARKS[w], color="0.3", linestyle="none", fillstyle="full" if w == "ours" else "none") for w in seen
    ]
    axes.add_artist(axes.legend(marks, ["fastlm" if w == "ours" else w for w in seen], fontsize="small", loc="upper left"))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte",
        ylabel="GFLOP/s",
        title=f"{rows[0]['cpu']}, {rows[0]['threads']} threads",
    )
    axes.legend(fontsize="small", ncols=2, loc="lower right")
    axes.set_ylim(bottom=min(y for _, y in every) / 2, top=max(roof["gflops"], max(y for _, y in every)) * 2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
