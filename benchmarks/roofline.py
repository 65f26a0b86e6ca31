"""The measured points under the measured roof."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlm.benchmarks.results import Group, Key, higher

MARKS = {  # of each contestant
    "ours": "o", "ours_avx2": ".", "numpy": "_", "dense": "|", "torch": "x", "torch_compile": "+", "transformers": "1",
    "ctranslate2": "s", "onnxruntime": "D", "openvino": "^", "llama_cpp": "v", "ik_llama": "P",
}  # fmt: skip


def draw(groups: dict[Key, Group], path: str) -> bool:
    """Writes the roofline plot of a file's rows at their highest number of threads to a PNG or SVG file: operations over the bytes that
    must be read, under the ceilings of float32 and of 8-bit products. False where there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    rows = [g for g in groups.values() if (mine := g.lines.get("ours")) and mine.get("work") and min(mine["work"]) > 0 and g.roof]
    rows = [g for g in rows if g.lines["ours"].get("median_ms")]
    if not rows:
        return False
    threads = max(g.key[3] for g in rows)
    rows = [g for g in rows if g.key[3] == threads]
    roof: dict[str, float] = {}
    for g in rows:
        roof = higher(roof, g.roof)

    def point(g: Group, who: str) -> tuple[float, float]:
        operations, size = g.lines["ours"]["work"]
        return operations / size, operations / g.median(who) / 1e9

    ops = list(dict.fromkeys(g.key[0] for g in rows))
    points = {  # (operation, contestant) -> points
        (op, who): [point(g, who) for g in rows if g.key[0] == op and g.lines.get(who, {}).get("median_ms")]
        for op in ops
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
    for key, what in (
        ("gflops", "GFLOP/s float32"),
        ("fast_gflops", "GFLOP/s float32, fast inner product"),
        ("int8_scaled_gops", "Gop/s 8 bits, a scale for 32"),
        ("int8_gops", "Gop/s 8 bits"),
    ):
        if key in roof:
            axes.text(high, roof[key] * 1.05, f"{roof[key]:.0f} {what} ", ha="right", fontsize="small")
        if key in roof and key != "gflops":
            axes.plot(intensity, np.minimum(roof[key], roof["read_gbs"] * intensity), "k--", linewidth=0.8, zorder=1)
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
    names = ["fastlm" if w == "ours" else "fastlm, AVX2" if w == "ours_avx2" else w for w in seen]
    axes.add_artist(axes.legend(marks, names, fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1)))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte",
        ylabel="10^9 operations a second",
        title=f"{rows[0].lines['ours']['cpu']}, {threads} threads",
    )
    axes.legend(fontsize="small", loc="lower left", bbox_to_anchor=(1.01, 0))
    axes.set_ylim(bottom=min(y for _, y in every) / 2, top=max(roof["gflops"], max(y for _, y in every)) * 2)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return True
