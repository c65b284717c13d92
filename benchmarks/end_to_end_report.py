"""Tables and the plot of what end_to_end.py measured.

    python benchmarks/end_to_end_report.py [--shape 8b | --json FILE] [--sparse-acceptance FILE]

Prints Markdown: decode speed (tokens/s of the whole batch, and the ratio to BF16 KV), peak memory, and, whatever the
acceptance, what drafting must yield to pay and what it gains, for every context and batch; of configurations that draft, the
best number of drafted tokens at each point. Draws the first beside the JSON, without n-grams, which gain or lose by the text
alone. Of sparse drafts it also draws, in NAME-budget.png, speed against what they read, by policy: a step's time at each
budget from this JSON (it is the same for every policy), and accepted tokens from acceptance.py's with the same budgets.
"""

import argparse
import json
from pathlib import Path

from common import RESULTS
from end_to_end_configs import DRAFTS_AUTO, PEER_CACHES, SPARSE, drafted, drafter, is_held
from model_shapes import SHAPES

from vllm_quantspec.estimate import expected_tokens

ACCEPTANCES = (0.8, 0.9, 0.938, 0.97, 0.985)

# kind: (name in tables, colour and marker in the plot)
KINDS = {
    "bf16": ("BF16", "#555555", "s"),
    "fp8": ("FP8", "#e0a030", "s"),
    "int4_per_token_head": ("int4_per_token_head", "#7a7a3a", "D"),
    "turboquant_4bit_nc": ("turboquant_4bit_nc", "#8f6b4a", "D"),
    "turboquant_k8v4": ("turboquant_k8v4", "#b58f6a", "D"),
    "nvfp4": ("nvfp4", "#6a9a8a", "D"),
    "ngram": ("ngram", "#9bbf85", "v"),
    "draft": ("draft_model", "#8a6fb0", "v"),
    "self": ("self-draft", "#b07a8a", "v"),
    "cache": ("QuantSpec's cache alone", "#2a6fb0", "o"),
    "cache-int4": ("cache alone, 4 bits", "#5fa8e0", "^"),
    "int4": ("QuantSpec, 4 bits", "#e8909a", "^"),
    "sparse8": ("QuantSpec, 1/8 read", "#a03060", "o"),
    "sparse16": ("QuantSpec, 1/16 read", "#702050", "o"),
    "quantspec": ("QuantSpec", "#d1495b", "o"),
    DRAFTS_AUTO: ("QuantSpec, drafts: auto", "#c0a0d0", "^"),
}


def kind_of(config: str) -> str:
    return "quantspec" if config.isdigit() else drafter(config) or config


def best_rows(rows: list[dict]) -> dict[tuple[str, int, int], dict]:
    """{(kind, context, batch): the fastest row of that kind, or one that says how many sequences fit}."""
    best: dict[tuple[str, int, int], dict] = {}
    for row in rows:
        if not row["batch"]:  # a prompt's time
            continue
        key = kind_of(row["config"]), row["context"], row["batch"]
        speed = row.get("decode_tokens_per_s", 0)
        if key not in best or speed > best[key].get("decode_tokens_per_s", 0):
            best[key] = row
    return best


def speed_cell(row: dict) -> str:
    if "decode_tokens_per_s" not in row:
        return f"{row['sequences_that_fit']} fit" if "sequences_that_fit" in row else ""
    gamma = drafted(row["config"])
    notes = [f"{row['speedup']:.2f}x"] if "speedup" in row and row["config"] != "bf16" else []
    notes += [f"γ {gamma}"] if gamma else []
    return f"{row['decode_tokens_per_s']:.0f}" + (f" ({', '.join(notes)})" if notes else "")


def memory_cell(row: dict) -> str:
    return f"{row['peak_gib']:.1f}" if "peak_gib" in row else speed_cell(row) if "sequences_that_fit" in row else ""


def break_even_cell(row: dict) -> str:
    if "tokens_to_break_even" not in row:
        return ""
    needed = [f"{row[key]:.2f}" for key in ("tokens_to_break_even", "tokens_to_match_quantspec") if key in row]
    return f"{', '.join(needed)} of {drafted(row['config']) + 1}"


def acceptance_table(rows: list[dict]) -> str:
    """QuantSpec's ratio to BF16 KV if a draft token is accepted with other probabilities, with the best γ for each."""
    points: dict[tuple[int, int], list[dict]] = {}
    for row in rows:
        if kind_of(row["config"]) == "quantspec" and "tokens_to_break_even" in row:
            points.setdefault((row["batch"], row["context"]), []).append(row)

    def ratio(each: float, row: dict) -> float:
        return expected_tokens(each, drafted(row["config"])) / row["tokens_to_break_even"]

    lines = ["| context, batch | " + " | ".join(map(str, ACCEPTANCES)) + " |", "|---" * (1 + len(ACCEPTANCES)) + "|"]
    for (batch, context), measured in sorted(points.items()):
        cells = [f"{max(ratio(each, row) for row in measured):.2f}x" for each in ACCEPTANCES]
        lines.append(f"| {context // 1024}k, {batch} | " + " | ".join(cells) + " |")
    return "\n".join(["QuantSpec over BF16, by the acceptance of a draft token", "", *lines]) + "\n"


def table(title: str, best: dict, kinds: list[str], cell) -> str:
    lines = [
        title,
        "",
        "| context, batch | " + " | ".join(KINDS[k][0] for k in kinds) + " |",
        "|---" * (1 + len(kinds)) + "|",
    ]
    for context, batch in sorted({key[1:] for key in best}, key=lambda point: point[::-1]):
        cells = [cell(best.get((kind, context, batch), {})) for kind in kinds]
        lines.append(f"| {context // 1024}k, {batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def number_table(rows: list[dict]) -> str:
    """Of ``drafts-auto`` at each point: tokens/s of the batch for each number held, and for the numbers chosen."""
    by_point: dict[tuple[int, int], dict[str, dict]] = {}
    for row in rows:
        if "decode_tokens_per_s" in row and (row["config"] == DRAFTS_AUTO or is_held(row["config"])):
            by_point.setdefault((row["batch"], row["context"]), {})[row["config"]] = row
    held = sorted({config for of in by_point.values() for config in of if config != DRAFTS_AUTO}, key=drafted)
    lines = ["| context, batch | " + " | ".join(held) + " | chosen | over the best fixed | numbers chosen |"]
    lines.append("|---" * (4 + len(held)) + "|")
    for (batch, context), of in sorted(by_point.items()):
        cells = [f"{of[config]['decode_tokens_per_s']:.0f}" if config in of else "" for config in held]
        chosen = of.get(DRAFTS_AUTO)
        if chosen:
            steps = sum(chosen["numbers"].values())
            shares = ", ".join(f"{n}: {100 * s / steps:.0f} %" for n, s in chosen["numbers"].items())
            over = f"{chosen['over_best_fixed']:.3f} ({chosen['best_fixed']})" if "over_best_fixed" in chosen else ""
            cells += [f"{chosen['decode_tokens_per_s']:.0f}", over, shares]
        lines.append(f"| {context // 1024}k, {batch} | " + " | ".join(cells) + " |")
    return "\n".join(["Number of drafts held, and chosen, tokens/s of the batch", "", *lines]) + "\n"


def plot(path: Path, results: dict, best: dict, kinds: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batches = sorted({batch for _, _, batch in best})
    figure, axes = plt.subplots(1, len(batches), figsize=(4.8 * len(batches), 4.2), squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        contexts = sorted({context for _, context, b in best if b == batch})
        for kind in kinds:
            label, colour, marker = KINDS[kind]
            rows = [best.get((kind, context, batch), {}) for context in contexts]
            points = [(i, row) for i, row in enumerate(rows) if "decode_tokens_per_s" in row]
            speeds = [row["decode_tokens_per_s"] for _, row in points]
            style = "-" if marker == "o" else "--"
            axis.plot([i for i, _ in points], speeds, ls=style, marker=marker, ms=5, color=colour, label=label)
            if kind == "quantspec":
                for i, row in points:
                    ratio = f"{row['speedup']:.2f}x" if "speedup" in row else "BF16 does\nnot fit"
                    axis.annotate(
                        ratio,
                        (i, row["decode_tokens_per_s"]),
                        xytext=(0, 7),
                        textcoords="offset points",
                        ha="center",
                        fontsize=8,
                    )
        axis.set_xticks(range(len(contexts)), [f"{context // 1024}k" for context in contexts])
        axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
        axis.set_title(f"batch {batch}")
        axis.set_xlabel("context")
    axes[0][0].set_ylabel("decode tokens/s")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(kinds), frameon=False, fontsize=9)
    figure.suptitle(f"{results['shape']} shape, {results['machine']['gpu']}, acceptance {results['acceptance']} per token")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path.with_suffix(".png"), dpi=140)


def read_of(config: str) -> float:
    """The share of the old tokens that QuantSpec's drafts of this configuration read."""
    return SPARSE.get(drafter(config), {"draft_context": 1.0})["draft_context"]


def tokens_per_verification(per_position: list[float], gamma: int) -> float:
    """Of ``gamma`` drafts, with the share of drafts that were accepted at each position; beyond those that were measured
    each is accepted as often, after the one before it, as the last measured one."""
    rates = [1.0, *per_position]
    while len(rates) <= gamma:
        rates.append(rates[-1] ** 2 / rates[-2] if rates[-2] else 0.0)
    return sum(rates[: gamma + 1])


def speed_by_budget(rows: list[dict], acceptance: list[dict]) -> dict[tuple[int, int], dict[str, list[tuple[float, float]]]]:
    """{(context, batch): {policy: [(share of the old tokens read, ratio to BF16)]}}, each with the best number of drafts.

    Args:
        rows: of end_to_end.py. acceptance: of acceptance.py, of one context, temperature and text.
    """
    accepted: dict[str, dict[float, list[float]]] = {}
    for row in acceptance:
        budget = float(row.get("draft_context", 1.0))
        for policy in [row["draft_selection"]] if "draft_selection" in row else ["attention", "window", "snapkv"]:
            of_policy = accepted.setdefault(policy, {})
            if len(row["per_position"]) > len(of_policy.get(budget, [])):
                of_policy[budget] = row["per_position"]
    bf16 = {(row["context"], row["batch"]): row for row in rows if row["config"] == "bf16" and "ms_per_step" in row}
    best: dict[tuple[int, int], dict[str, dict[float, float]]] = {}
    for row in rows:
        kind, point = kind_of(row["config"]), (row["context"], row["batch"])
        if kind not in ("quantspec", *SPARSE) or "ms_per_step" not in row or point not in bf16:
            continue
        read = read_of(row["config"])
        for policy, of_policy in accepted.items():
            if read in of_policy:
                tokens = tokens_per_verification(of_policy[read], drafted(row["config"]))
                ratio = tokens * bf16[point]["ms_per_step"] / row["ms_per_step"]
                found = best.setdefault(point, {}).setdefault(policy, {})
                found[read] = max(ratio, found.get(read, 0))
    return {point: {policy: sorted(found.items()) for policy, found in by.items()} for point, by in best.items()}


def plot_budgets(path: Path, results: dict, acceptance: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    context = max(row["context"] for row in acceptance)
    temperature = max(row["temperature"] for row in acceptance)
    used = [r for r in acceptance if (r["context"], r["temperature"], r["novel"]) == (context, temperature, "all")]
    points = speed_by_budget(results["rows"], used)
    if not any(len(line) > 1 for by in points.values() for line in by.values()):
        print("No budget of sparse drafts has both a measured speed and a measured acceptance: no plot of them.")
        return
    figure, axes = plt.subplots(1, len(points), figsize=(3.4 * len(points), 3.8), squeeze=False)
    for axis, (point, by) in zip(axes[0], sorted(points.items(), key=lambda item: item[0][::-1]), strict=True):
        for policy, line in by.items():
            axis.plot(*zip(*line, strict=True), marker="o", label=policy)
        axis.set_xscale("log", base=2)
        ticks = sorted({read for line in by.values() for read, _ in line})
        axis.set_xticks(ticks, ["all" if read == 1 else f"1/{round(1 / read)}" for read in ticks])
        axis.set_title(f"{point[0] // 1024}k, batch {point[1]}")
        axis.set_xlabel("old tokens that a draft step reads")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("decode speed, times BF16")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(
        f"{results['shape']} shape, {results['machine']['gpu']}, acceptance as at {context // 1024}k and T={temperature:g}",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path.with_name(f"{path.stem}-budget.png"), dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", help=f"{', '.join(SHAPES)}, or what the JSON is called by")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--sparse-acceptance", type=Path, default=RESULTS / "sparse_acceptance-books-30m.json", help="of acceptance.py"
    )
    args = parser.parse_args()
    path = args.json or RESULTS / f"end_to_end-{args.shape}.json"
    results = json.loads(path.read_text())
    best = best_rows(results["rows"])
    kinds = [kind for kind in KINDS if any(key[0] == kind for key in best)]
    drafting = [kind for kind in kinds if kind not in ("bf16", "fp8", *PEER_CACHES, "cache", "cache-int4", DRAFTS_AUTO)]
    for (kind, context, batch), row in best.items():
        quantspec = best.get(("quantspec", context, batch), {})
        if kind in ("ngram", "draft", "self") and "ms_per_step" in row and "ms_per_step" in quantspec:
            row["tokens_to_match_quantspec"] = row["ms_per_step"] / quantspec["expected_ms_per_token"]
    print(table("Decode, tokens/s of the batch (ratio to BF16)", best, kinds, speed_cell))
    print(table("Peak memory of the point, GiB", best, kinds, memory_cell))
    print(table("Tokens a verification must yield to be as fast as BF16, as QuantSpec", best, drafting, break_even_cell))
    print(acceptance_table(results["rows"]))
    if any(key[0] == DRAFTS_AUTO for key in best):
        print(number_table(results["rows"]))
    plot(path, results, best, [kind for kind in kinds if kind != "ngram"])
    if any(kind_of(row["config"]) in SPARSE for row in results["rows"]):
        if args.sparse_acceptance.exists():
            plot_budgets(path, results, json.loads(args.sparse_acceptance.read_text())["rows"])
        else:
            print(f"{args.sparse_acceptance} is not there: no plot of speed against the budget.")


if __name__ == "__main__":
    main()
