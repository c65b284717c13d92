"""Capacity against speed: what each cache holds in a GiB and how fast it decodes, from the JSON of end_to_end.py.

    python benchmarks/end_to_end.py --configs bf16 fp8 cache-int4 turboquant_4bit_nc --together 17 --json OUT
    python benchmarks/capacity_report.py OUT [MORE ...]

Prints a table, and draws OUT-capacity.png beside the first file: both over BF16's at the same context and batch, in the same
file. Capacity is that of the blocks which the sequences of a point hold in vLLM's pool, so it counts windows and padding.
"""

import argparse
import json
from pathlib import Path

from end_to_end_report import KINDS, best_rows

MARKERS = "osv^D"


def points_of(rows: list[dict]) -> dict[tuple[int, int], dict[str, tuple[float, float]]]:
    """{(context, batch): {kind: (tokens per GiB, decode speed), both over BF16's}} of what was measured beside BF16."""
    best, points = best_rows(rows), {}
    for (kind, context, batch), row in best.items():
        base = best.get(("bf16", context, batch), {})
        if "speedup" in row and row.get("kv_gib") and base.get("kv_gib"):
            points.setdefault((context, batch), {})[kind] = base["kv_gib"] / row["kv_gib"], row["speedup"]
    return points


def table(points: dict) -> str:
    lines = ["| context, batch | cache | tokens per GiB | speed |", "|---|---|---|---|"]
    for (context, batch), kinds in sorted(points.items()):
        for kind, (capacity, speed) in sorted(kinds.items(), key=lambda item: item[1]):
            lines.append(f"| {context // 1024}k, {batch} | {KINDS[kind][0]} | {capacity:.2f}x | {speed:.2f}x |")
    return "\n".join(lines)


def plot(path: Path, points: dict, gpu: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2))
    axis.axhline(1, color="#999999", linewidth=0.8)
    axis.axvline(1, color="#999999", linewidth=0.8)
    kinds = [kind for kind in KINDS if any(kind in at for at in points.values())]
    for kind in kinds:
        label, colour, _ = KINDS[kind]
        for marker, at in zip(MARKERS, sorted(points), strict=False):
            if kind in points[at]:
                axis.plot(*points[at][kind], marker, color=colour, label=label, markersize=8)
                label = None
    for marker, (context, batch) in zip(MARKERS, sorted(points), strict=False):
        axis.plot([], [], marker, color="#555555", label=f"{context // 1024}k tokens, batch {batch}", fillstyle="none")
    axis.set_xlabel("tokens that fit, over BF16's")
    axis.set_ylabel("decode speed over BF16's")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.set_title(f"KV caches on {gpu}", fontsize=10)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="+", help="of end_to_end.py, each with rows of bf16")
    args = parser.parse_args()
    points: dict = {}
    for path in args.json:
        results = json.loads(path.read_text())
        for at, kinds in points_of(results["rows"]).items():
            points.setdefault(at, {}).update(kinds)
    if not any(len(kinds) > 1 for kinds in points.values()):
        parser.error("there is nothing to compare: measure bf16 and another cache at the same points")
    print(table(points))
    plot(args.json[0].with_name(f"{args.json[0].stem}-capacity.png"), points, results["machine"].get("gpu") or "a CPU")


if __name__ == "__main__":
    main()
