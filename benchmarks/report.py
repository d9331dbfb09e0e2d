"""What the committed JSON says: the tables of benchmarks/RESULTS.md, the README's cost table and docs/step_cost.png.

    python benchmarks/report.py

`make bench` measures first. tests/test_benchmarks.py checks that the tables are those of the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "step_cost.png"
STEPS, SIZES = RESULTS / "step_cost.json", RESULTS / "optimizer_step.json"
SHARDED = RESULTS / "sharded.json"
METHODS, METHODS_PICTURE = RESULTS / "methods_cost.json", ROOT / "docs" / "methods_cost.png"
ROWS = {  # of the table: the run whose memory belongs to it
    "off": "off",
    "IRE, K=10": "IRE",
    "IRE, fraction=0.25, K=10": "IRE, fraction=0.25",
    "IRE, SecondMoment, K=10": "IRE, SecondMoment",
    "IRE, K=1": "IRE",
    "SAM": "SAM",
    "SAM-IRE, K=10": "SAM-IRE",
    "AverageSAM-IRE, K=10": "AverageSAM-IRE",
    "SAM-IRE, K=10, against SAM": "",
}
CODE = {
    "off": "`IRE(kappa=0)`",
    "IRE, K=10": "`IRE()`: K = 10",
    "IRE, fraction=0.25, K=10": "`IRE(curvature=SampledFisher(fraction=0.25))`",
    "IRE, SecondMoment, K=10": "`IRE(curvature=SecondMoment())`",
    "IRE, K=1": "`IRE(interval=1)`",
    "SAM": "`IRE(kappa=0, perturbation=SAM(0.05))`",
    "SAM-IRE, K=10": "`IRE(perturbation=SAM(0.05))`",
    "AverageSAM-IRE, K=10": "`IRE(perturbation=AverageSAM(0.05))`",
    "SAM-IRE, K=10, against SAM": "the same against SAM's step",
}
TARGETS = {  # the project's own
    "off": 1.0,
    "IRE, K=10": 1.07,
    "IRE, fraction=0.25, K=10": 1.035,
    "IRE, SecondMoment, K=10": 1.02,
    "SAM": 2.03,
    "SAM-IRE, K=10, against SAM": 1.05,
}
SIZE_TARGETS = {"mask": 0.2, "step + boost: AdamW, fused": 2.0}
KEPT_TARGET = 1.0  # bytes
METHOD_TARGETS = {  # the project's own; of two of them beside SAM's own ratio
    "MomentumSAM(rho=0.05)": 1.05,
    "SAM(rho=0.05, start_step=0.9)": 1.11,
    "LookSAM(rho=0.05, k=5)": 1.25,
    "SAM(rho=0.05, fraction=0.25)": 1.30,
}
BESIDE_SAM = {"GSAM(rho=0.05)": 0.05, "FriendlySAM(rho=0.05)": 0.05}


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def where(content: Mapping[str, Any]) -> str:
    """Hardware, versions and settings, in a line."""
    machine = content["machine"]
    device = "on the GPU" if content["device"] == "cuda" else f"threads: {machine['threads']}"
    packages = ", ".join(f"{name} {machine[name]}" for name in ("torch", "lightning", "lightning_ire"))
    settings = [content[name] for name in ("precision",) if name in content]
    settings += ["compiled"] if content.get("compile") else []
    return f"{machine['hardware']}, {device}, Python {machine['python']}, {packages}" + "".join(
        f", {setting}" for setting in settings
    )


def step_table(content: Mapping[str, Any]) -> str:
    """Ratios with quartiles, and the floor of each."""
    workloads = content["workloads"]
    lines = []
    for row in ROWS:
        cells = []
        for one in workloads.values():
            found = one["rows"].get(row)
            cells.append(
                f"**{found['ratio']:.3f}** ({found['low']:.2f} to {found['high']:.2f}), {found['floor']:.3f}"
                if found
                else "-"
            )
        if set(cells) != {"-"}:
            lines.append([row, *cells])
    heads = [
        f"{name}: {one['parameters'] / 1e6:.1f} M, {one['seconds']:.2g} s, {one['rounds']} rounds"
        for name, one in workloads.items()
    ]
    return table(["", *heads], lines)


def memory_table(content: Mapping[str, Any]) -> str:
    """Bytes per parameter beyond plain training: most inside a step, and between two steps."""
    workloads = {name: one for name, one in content["workloads"].items() if "memory" in one}
    lines = [
        [run, *(f"{one['memory'][run]['peak']:.1f}, {one['memory'][run]['kept']:.2f}" for one in workloads.values())]
        for run in dict.fromkeys(filter(None, ROWS.values()))
    ]
    return table(["", *workloads], lines)


def size_table(content: Mapping[str, Any]) -> str:
    """Ratios and nanoseconds per parameter, by size."""
    measurements = content["measurements"]
    sizes = list(dict.fromkeys(size for each in measurements.values() for size in each))
    lines = []
    for name, each in measurements.items():
        cells = []
        for size in sizes:
            one = each.get(size)
            scale = 1e9 / one["parameters"] if one else 0.0
            cells.append(
                f"**{one['ratio']:.2f}** ({one['ours'] * scale:.2f} / {one['theirs'] * scale:.2f})" if one else "-"
            )
        lines.append([name, *cells])
    return table(["", *sizes], lines)


def cost_table(content: Mapping[str, Any]) -> str:
    """What a user wants to know: ratios, and memory as a range over the networks."""
    workloads = content["workloads"]
    lines = []
    for row, run in ROWS.items():
        cells = [f"{one['rows'][row]['ratio']:.2f}" for one in workloads.values()]
        memory = [one["memory"][run] for one in workloads.values()] if run else []
        kept, peak = (
            (spread([one["kept"] for one in memory]), spread([one["peak"] for one in memory])) if run else ("", "")
        )
        lines.append([CODE[row], *cells, kept, peak])
    return table(["step, against the same without the callback", *workloads, "bytes kept", "bytes in a step"], lines)


def target_table(steps: Mapping[str, Any], sizes: Mapping[str, Any]) -> str:
    """What was aimed at and what was found."""
    workloads = steps["workloads"]
    lines = [
        [row, f"{target:g}", *(verdict(one["rows"][row], target) for one in workloads.values())]
        for row, target in TARGETS.items()
    ]
    kept = [max(each["kept"] for each in one["memory"].values()) for one in workloads.values()]
    verdicts = [f"{most:.2f}: " + ("met" if round(most, 2) <= KEPT_TARGET else "missed") for most in kept]
    lines.append(["bytes kept per parameter", f"{KEPT_TARGET:g}", *verdicts])
    for name, target in SIZE_TARGETS.items():
        one = sizes["measurements"][name]["25 M"]
        lines.append([f"{name}, 25 M", f"{target:g}", verdict(one, target), *["-"] * (len(workloads) - 1)])
    return table(["", "at most", *workloads], lines)


def verdict(found: Mapping[str, float], target: float) -> str:
    if found["ratio"] <= target:
        return f"{found['ratio']:.3f}: met"
    return f"{found['ratio']:.3f}: " + ("within the quartiles" if found["low"] <= target else "missed")


def spread(values: list[float]) -> str:
    """The smallest and the largest, rounded to whole numbers."""
    ends = sorted({round(min(values)), round(max(values))})
    return " to ".join(map(str, ends))


def traffic_table(content: Mapping[str, Any]) -> str:
    """Collectives of a step under FSDP2, with the bytes that a rank puts in, beyond those of plain training."""
    plain, kinds = content["traffic"]["plain"][2], ("all_gather", "reduce_scatter", "all_reduce")

    def cell(step: Mapping[str, Any], kind: str) -> str:
        calls, sent = step["calls"].get(kind, 0), step["bytes"].get(kind, 0)
        return f"{calls} ({sent / 1e3:,.1f} kB)" if calls else "0"

    lines = []
    for name, steps in content["traffic"].items():
        step = steps[2]
        what = "plain training" if name == "plain" else f"{name}, a {'step' if 'SAM' in name else 'refresh'}"
        lines.append([what, *(cell(step, kind) for kind in kinds)])
    assert content["traffic"]["SampledFisher"][3]["calls"] == plain["calls"]
    lines.insert(
        1,
        [
            "IRE, a step between two refreshes",
            *(cell(plain, kind) for kind in ("all_gather", "reduce_scatter", "all_reduce")),
        ],
    )
    return table(["", "all-gather", "reduce-scatter", "all-reduce"], lines)


def ranking_table(content: Mapping[str, Any]) -> str:
    """Seconds to rank a rank's part of the estimate."""
    found: dict[int, list[float]] = {}
    for one in content["threshold"]:
        found.setdefault(one["elements"], []).append(one["seconds"])
    lines = [
        [f"{count / 1e6:,.0f} M", f"{min(seconds):.2f}", f"{min(seconds) / count * 1e9:.1f}"]
        for count, seconds in sorted(found.items())
    ]
    return table(["values on a rank", "seconds", "ns per value"], lines)


def methods_table(content: Mapping[str, Any]) -> str:
    """Ratios with quartiles of each relative of SAM, and what they were to be at most."""
    workloads = content["workloads"]
    lines = []
    for method in next(iter(workloads.values()))["rows"]:
        found = [one["rows"][method] for one in workloads.values()]
        aim = f"{METHOD_TARGETS[method]:.2f}" if method in METHOD_TARGETS else ""
        if method in BESIDE_SAM:
            sam = [one["rows"]["SAM(rho=0.05)"]["ratio"] for one in workloads.values()]
            aim = " / ".join(f"{ratio + BESIDE_SAM[method]:.2f}" for ratio in sam)
        cells = [f"**{one['ratio']:.3f}** ({one['low']:.2f} to {one['high']:.2f})" for one in found]
        lines.append([f"`{method}`", *cells, aim])
    heads = [f"{name}: {one['seconds']:.2g} s, {one['rounds']} rounds" for name, one in workloads.items()]
    return table(["", *heads, "aim"], lines)


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def blocks() -> dict[Path, dict[str, str]]:
    """For each file, what stands between its markers."""
    steps, sizes, sharded, methods = load(STEPS), load(SIZES), load(SHARDED), load(METHODS)
    gpu = []
    for path in sorted((RESULTS / "gpu").glob("*.json")):
        content = load(path)
        make = size_table if "measurements" in content else step_table
        gpu.append(f"{where(content)}\n\n{make(content)}")
        if any("memory" in one for one in content.get("workloads", {}).values()):
            gpu.append(memory_table(content))
    return {
        ROOT / "benchmarks" / "RESULTS.md": {
            "steps": f"{where(steps)}\n\n{step_table(steps)}",
            "memory": memory_table(steps),
            "sizes": f"{where(sizes)}\n\n{size_table(sizes)}",
            "targets": target_table(steps, sizes),
            "methods": f"{where(methods)}\n\n{methods_table(methods)}",
            "traffic": traffic_table(sharded),
            "ranking": f"{where(sharded)}\n\n{ranking_table(sharded)}",
            "gpu": "\n\n".join(gpu) or "None yet: no session has had such a machine.",
        },
        ROOT / "docs" / "sharded.md": {"traffic": traffic_table(sharded)},
        ROOT / "README.md": {"cost": f"{cost_table(steps)}\n\n*{where(steps)}*"},
    }


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: made by benchmarks/report.py, checked by tests/test_benchmarks.py -->\n", (
        f"\n<!-- end of {name} -->"
    )


def between(text: str, name: str) -> str:
    """What stands between the markers."""
    begin, end = marks(name)
    return text.split(begin)[1].split(end)[0]


def rewrite(path: Path, contents: Mapping[str, str]) -> None:
    text = path.read_text()
    for name, content in contents.items():
        begin, end = marks(name)
        text = text.replace(begin + between(text, name) + end, begin + content + end)
    path.write_text(text)


def draw() -> None:
    import matplotlib.pyplot as plt

    steps, sizes = load(STEPS), load(SIZES)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained", width_ratios=(3, 2))
    rows = [row for row in ROWS if row != "SAM-IRE, K=10, against SAM"]
    for number, (name, one) in enumerate(steps["workloads"].items()):
        found = [one["rows"][row] for row in rows]
        ratios = [each["ratio"] for each in found]
        height = [index + 0.18 * (number - 1.5) for index in range(len(rows))]
        ends = [[each["ratio"] - each["low"] for each in found], [each["high"] - each["ratio"] for each in found]]
        left.errorbar(ratios, height, xerr=ends, fmt="o", markersize=4, capsize=2, label=name)
        left.plot([each["floor"] for each in found], height, "k|", markersize=9, label="" if number else "floor")
    left.set_yticks(range(len(rows)), rows)
    left.invert_yaxis()
    left.set(xlabel="step, against the same step without the callback", title="Step cost: median, quartiles, floor")
    left.legend(loc="upper right")
    left.grid(alpha=0.3)
    growth: dict[str, tuple[str, Callable[[dict[str, float]], float]]] = {
        "AdamW, fused": ("step + boost: AdamW, fused", lambda one: one["theirs"]),
        "AdamW, fused + boost": ("step + boost: AdamW, fused", lambda one: one["ours"]),
        "concatenate + kthvalue": ("mask", lambda one: one["theirs"]),
        "new mask": ("mask", lambda one: one["ours"]),
    }
    for (name, (measurement, pick)), style in zip(growth.items(), ("--", "-", "--", "-"), strict=True):
        each = [one for size, one in sizes["measurements"][measurement].items() if "x" not in size]
        counts = [one["parameters"] for one in each]
        right.plot(counts, [pick(one) / one["parameters"] * 1e9 for one in each], style, marker="o", label=name)
    right.set(xscale="log", yscale="log", xlabel="parameters", ylabel="ns per parameter", title="Growth (flat: linear)")
    right.set_ylim(bottom=0.1)
    right.legend(loc="lower left")
    right.grid(alpha=0.3)
    figure.savefig(PICTURE, dpi=100)
    plt.close(figure)

    methods = load(METHODS)["workloads"]
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for number, (name, one) in enumerate(methods.items()):
        found = list(one["rows"].values())
        height = [index + 0.2 * (number - (len(methods) - 1) / 2) for index in range(len(found))]
        ends = [[each["ratio"] - each["low"] for each in found], [each["high"] - each["ratio"] for each in found]]
        ratios = [each["ratio"] for each in found]
        axis.errorbar(ratios, height, xerr=ends, fmt="o", markersize=4, capsize=2, label=name)
    names = list(next(iter(methods.values()))["rows"])
    for method, aim in METHOD_TARGETS.items():
        axis.plot(aim, names.index(method), "k|", markersize=16)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(
        xlabel="step, against a plain one of the same run (median, quartiles; bars: aims)", title="SAM's relatives"
    )
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(METHODS_PICTURE, dpi=100)


def main() -> None:
    for path, contents in blocks().items():
        rewrite(path, contents)
        print(f"wrote {path.relative_to(ROOT)}")
    draw()
    print(f"wrote {PICTURE.relative_to(ROOT)}, {METHODS_PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
