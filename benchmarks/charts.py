"""Draws the charts of the README from the results files, and prints the table of GPU rows where there are any.

`pip install duovsr[bench]`, then `python benchmarks/charts.py` writes `results/chart_*.png`.
"""

# mypy: disable-error-code="import-not-found"
# (matplotlib is an extra)

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measuring import RESULTS
from workloads import PHASES, table

CARD = Path(__file__).parents[1] / "weights" / "MODEL_CARD.md"
CPUS = {"cpu_speed_amx.json": "Intel Xeon with AMX", "cpu_speed.json": "AMD EPYC without AMX"}
METRICS = {"psnr_y": "PSNR-Y, dB", "vmaf": "VMAF", "niqe": "NIQE (lower is better)"}
CARD_COLUMNS = ("psnr_y", "ssim_y", "vmaf", "niqe", "ewarp_dis")
VALIDATIONS = {
    "validation_psnr": "PSNR-Y, dB",
    "validation_ssim": "SSIM-Y",
    "validation_detail": "detail (the truth's is 1)",
}
SETS = {"real": "degraded clips", "bi": "clean clips"}
PEER = "realesr-animevideov3"
OURS, THEIRS, OTHER = "#1b6ca8", "#c7762e", "#8a8a8a"
Record = dict[str, Any]


def read(name: str) -> Record:
    record: Record = json.loads((RESULTS / name).read_text())
    return record


def panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.2 * count, 3.6), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)
    figure.suptitle(title, fontsize=11)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", linewidth=0.4)
        axis.set_axisbelow(True)
    return figure, list(axes[0])


def speed(records: dict[str, Record]) -> Figure:
    """Frames a second beside the peer: medians as bars, and lines from the slowest round to the fastest."""
    figure, axes = panels(len(records), "320x180 to 1280x720 on two cores: frames a second")
    for axis, (cpu, record) in zip(axes, records.items(), strict=True):
        for place, what in enumerate(("inference", "end_to_end")):
            for offset, name, color in ((-0.2, "duovsr", OURS), (0.2, "peer", THEIRS)):
                times = record[what][name]
                fps, least, most = (1000 / times[key] for key in ("median_ms", "max_ms", "min_ms"))
                label = {"duovsr": "duovsr, tiny", "peer": f"{PEER}, ncnn"}[name] if place == 0 else None
                axis.bar(place + offset, fps, 0.38, color=color, label=label)
                axis.vlines(place + offset, least, most, color="black", linewidth=1)
            ratio = record[what]["speed_relative_to_peer"]
            axis.text(place - 0.2, 0.2, f"{ratio:.2f}x", ha="center", va="bottom", color="white", weight="bold")
        axis.set_xticks([0, 1], ["inference", "with decoding\nand encoding"])
        axis.set_title(f"{cpu}, {record['date'][:10]}", fontsize=10)
    axes[0].legend(fontsize=8, loc="upper right")
    return figure


def quality(ours: Record, card: str, cpu: Record) -> Figure:
    """Quality over speed. The rows of others are the model card's; bicubic has no measured speed, and is a line."""
    others = card_rows(card)
    fps = {name: 1000 / cpu["inference"][key]["median_ms"] for name, key in (("tiny", "duovsr"), (PEER, "peer"))}
    figure, axes = panels(
        len(METRICS), "Quality beside speed: 11 held-out clips; inference on the AMD EPYC of the other chart"
    )
    for axis, (metric, label) in zip(axes, METRICS.items(), strict=True):
        for of, marker in zip(SETS, ("o", "s"), strict=True):
            values = {"tiny": ours["sets"][of]["means"][metric], PEER: others[of, PEER][metric]}
            for name, color in (("tiny", OURS), (PEER, THEIRS)):
                axis.scatter(fps[name], values[name], color=color, marker=marker, s=45, label=f"{name}, {SETS[of]}")
            bicubic = others[of, "bicubic"][metric]
            axis.axhline(bicubic, color=OTHER, linestyle=":" if of == "real" else "--", linewidth=1)
            axis.text(0.1, bicubic, f"bicubic, {SETS[of]}", fontsize=7, color=OTHER, va="bottom")
        axis.set_xlim(0, 1.3 * max(fps.values()))
        axis.margins(y=0.15)
        axis.set_xlabel("frames a second", fontsize=8)
        axis.set_title(label, fontsize=10)
    axes[0].legend(fontsize=7, loc="center left")
    return figure


def card_rows(card: str) -> dict[tuple[str, str], dict[str, float]]:
    """Rows of the model card's table of scores, by set and method."""
    rows = {}
    for line in card.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in SETS and len(cells) == 2 + len(CARD_COLUMNS):
            rows[cells[0], cells[1]] = dict(zip(CARD_COLUMNS, map(float, cells[2:]), strict=True))
    return rows


def cost(record: Record) -> Figure:
    """Of `tiny`, measured: processor seconds and peak memory by frames and by pixels."""
    figure, (frames, pixels, memory) = panels(3, "tiny on one core of a CPU, measured")
    rows = [row for row in record["measured"] if row["model"] == "tiny"]
    clip = [row for row in rows if row["series"] == "frames"]
    curve(frames, [(row["frames"], row["processor_seconds"]["median"]) for row in clip], OURS, "processor seconds")
    beside = frames.twinx()
    curve(beside, [(row["frames"], row["peak_gib"]) for row in clip], OTHER, "peak memory, GiB")
    beside.set_ylim(0, 2 * max(row["peak_gib"] for row in clip))
    beside.legend(fontsize=8, loc="lower right")
    frames.set_xlabel(f"frames of {clip[0]['size'][0]}x{clip[0]['size'][1]}")
    sizes = [row for row in rows if row["series"] == "pixels"]
    for tile, color in zip(dict.fromkeys(row["tile"] for row in sizes), (OURS, THEIRS), strict=False):
        own = [row for row in sizes if row["tile"] == tile]
        label = f"tiles of {tile}" if tile else "whole frames"
        seconds = [(area(row), row["processor_seconds"]["median"] / row["frames"]) for row in own]
        curve(pixels, seconds, color, f"{label}: processor seconds a frame")
        curve(memory, [(area(row), row["peak_gib"]) for row in own], color, f"{label}: peak memory, GiB")
    for axis in (pixels, memory):
        axis.set_xlabel("megapixels of the output")
    for axis in (frames, pixels, memory):
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8, loc="upper left")
    return figure


def counted(record: Record) -> Figure:
    """Of `1.3b`, counted: TFLOP a frame by pixels, planned memory, and TFLOP by frames."""
    figure, (work, memory, frames) = panels(3, "1.3b: counted work and planned memory, not measured")
    part, clip = record["counted"], record["counted"]["pixels"][0]["frames"]
    labels = {"full": "full attention", "window": f"windows of {part['window']}", "tiles": f"tiles of {part['tile']}"}
    for way, color in zip(labels, (THEIRS, OURS, OTHER), strict=True):
        own = [row for row in part["pixels"] if row["way"] == way]
        tflop = [(area(row), sum(row["tflop"][phase] for phase in PHASES) / clip) for row in own]
        curve(work, tflop, color, f"{labels[way]}: TFLOP a frame")
        if way != "window":  # which the plan does not distinguish from full attention
            label = labels[way] if way == "tiles" else "whole frames"
            curve(memory, [(area(row), row["planned_gib"]) for row in own], color, f"{label}: planned GiB")
    card = "planned_gib_24_gb"
    curve(memory, [(area(row), row[card]) for row in own], OURS, "on a card of 24 GB: planned GiB")
    by_frames = part["frames"]
    curve(
        frames,
        [(row["frames"], row["tflop_as_one_clip"]) for row in by_frames],
        THEIRS,
        "as one clip: TFLOP of the DiT",
    )
    curve(frames, [(row["frames"], row["tflop"]) for row in by_frames], OURS, f"clips of {clip}: TFLOP of the DiT")
    for axis in (work, memory):
        axis.set_xlabel("megapixels of the output")
    frames.set_xlabel("frames of 960x540")
    for axis in (work, memory, frames):
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    return figure


def training(record: Record) -> Figure:
    """Validations of the runs in pixels, one after another; those of other windows do not compare."""
    runs = [run for run in record["runs"].values() if run["stage"] == "refine"]
    figure, axes = panels(len(VALIDATIONS), "Training of tiny: means over held-out windows")
    for axis, (key, title) in zip(axes, VALIDATIONS.items(), strict=True):
        before, seen = 0, list[str]()
        for run in runs:
            windows = "{validation_samples} of {crop}x{crop}x{frames}".format(**run["settings"])
            windows += f" of {', '.join(run['held_out'])}"
            points = [(before + row["step"], row[key]) for row in run["validation"]]
            label = None if windows in seen else windows
            seen += [windows] if label else []
            curve(axis, points, f"C{seen.index(windows)}", label)
            before = int(points[-1][0]) + 1
        axis.set_xlabel("steps, one run after another", fontsize=8)
        axis.set_title(title, fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside right center")
    return figure


def gpu(record: Record) -> Figure:
    """Seconds of each stage of the workloads beside the floor."""
    rows = [row for part in record["parts"].values() for row in part.get("rows", []) if "floor_seconds" in row]
    figure, (axis,) = panels(1, f"{record['machine']['device']}: seconds a stage, and the floor")
    figure.set_size_inches(9, 0.9 + 0.5 * len(rows))
    for place, row in enumerate(reversed(rows)):
        for offset, seconds in (
            (0.18, {stage: each["median"] for stage, each in row["stages"].items()}),
            (-0.18, {stage: least for stage, least in row["floor_seconds"].items() if stage != "total"}),
        ):
            left = 0.0
            for color, stage in enumerate(row["stages"]):
                width = seconds.get(stage, 0.0)
                name = stage if (place, offset) == (0, 0.18) else None
                axis.barh(place + offset, width, 0.34, left=left, color=f"C{color}", label=name)
                left += width
    axis.set_yticks(range(len(rows)), [row["workload"].replace("`", "") for row in reversed(rows)], fontsize=8)
    axis.legend(fontsize=7, ncols=2)
    return figure


def area(row: Record) -> float:
    pixels: float = row["size"][0] * row["size"][1] / 1e6
    return pixels


def curve(axis: Axes, points: list[tuple[float, float]], color: str, label: str | None) -> None:
    axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=color, label=label)


def draw_all(out: Path) -> list[Path]:
    """Of every results file that is there."""
    figures = {
        "cpu_speed": speed({cpu: read(name) for name, cpu in CPUS.items()}),
        "quality": quality(read("quality.json"), CARD.read_text(), read("cpu_speed.json")),
    }
    if (RESULTS / "cost.json").exists():
        figures |= {"cost": cost(read("cost.json")), "cost_1.3b": counted(read("cost.json"))}
    if (RESULTS / "training.json").exists():
        figures["training"] = training(read("training.json"))
    for path in sorted(RESULTS.glob("gpu_*.json")):
        record = read(path.name)
        figures[path.stem] = gpu(record)
        rows = [row for part in record["parts"].values() for row in part.get("rows", []) if "workload" in row]
        print(f"{record['machine']['device']}\n\n{table(rows)}\n")
    paths = []
    for name, figure in figures.items():
        paths.append(out / f"chart_{re.sub(r'[^a-z0-9]+', '_', name)}.png")
        figure.savefig(paths[-1], dpi=90, metadata={"Software": None})
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    for path in draw_all(parser.parse_args().out):
        print(path)


if __name__ == "__main__":
    main()
