"""Draws ratios of times, one dot for each cell, peer and machine, and errors by margin."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from benchmarks.measure import OURS
from benchmarks.peers import CHUNKED, COMPILED, JAX_NN, OPTAX, OPTAX_FLOAT32, TOKAMAX, TORCH
from benchmarks.report import heading, peers_of, timed, timed_on, unique, with_errors
from benchmarks.results import Record, Results

NAMES = [OPTAX, JAX_NN, TORCH, TOKAMAX, CHUNKED, COMPILED, OPTAX_FLOAT32]
COLOURS = {name: f"C{n}" for n, name in enumerate(NAMES)} | {OURS: "black"}
MARKERS = ["o", "s", "^", "D", "v", "P"]
Series = dict[str, list[Record]]  # what is told apart by its marker: records by the name of a card or a format


def draw(kept: list[Results], folder: Path) -> None:
    """Draws what there are records of: times on all GPUs, times on the first CPU, errors by margin."""
    gpus, cpus, told = timed_on(kept, "gpu"), timed_on(kept, "cpu"), with_errors(kept)
    figures = {
        "times_gpu": [draw_ratios({heading(gpu): timed(gpu) for gpu in gpus}, "GPUs")] if gpus else [],
        "times_cpu": [draw_ratios(by_format(timed(cpu)), heading(cpu)) for cpu in cpus[:1]],
        "errors": [draw_errors(found.of("accuracy")) for found in told[:1]],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawn in figures.items():
        for figure in drawn:
            figure.savefig(folder / f"{name}.png", dpi=110)


def by_format(chosen: list[Record]) -> Series:
    """The cells' names without their format."""
    found: Series = {}
    for record in chosen:
        shape, dtype = record["cell"].rsplit(" ", 1)
        found.setdefault(dtype, []).append({**record, "cell": shape})
    return found


def draw_ratios(series: Series, title: str) -> Figure:
    """One panel for each function and pass, one row for each cell."""
    names = peers_of([record for records in series.values() for record in records])
    panels: dict[str, Series] = {}
    for name, records in series.items():
        for record in records:
            panel = panels.setdefault(f"{record['what']}, {record['passes']}", {of: [] for of in series})
            panel[name].append(record)
    heights = list(map(height_of, panels.values()))
    rows = [max(heights[n : n + 2]) for n in range(0, len(heights), 2)]
    figure = Figure(figsize=(9, sum(rows) + 0.8), layout="constrained")
    axes = list(figure.subplots(len(rows), 2, squeeze=False, height_ratios=rows).flat)
    for ax, (what, panel) in zip(axes, panels.items(), strict=False):
        draw_dots(ax, panel)
        ax.set_title(what, fontsize=8)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    handles = [Line2D([], [], marker="o", linestyle="", color=COLOURS[name], label=name) for name in names]
    for marker, name in zip(MARKERS, series, strict=False):
        handles.append(Line2D([], [], marker=marker, linestyle="", color="grey", fillstyle="none", label=name))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def height_of(panel: Series) -> float:
    """In inches: a line for each dot of a cell, and its title and axis."""
    every = [record for records in panel.values() for record in records]
    lanes = sum(map(bool, panel.values())) * len(peers_of(every))
    return 1 + len({record["cell"] for record in every}) * max(0.045 * lanes, 0.15)


def draw_dots(ax: Axes, series: Series) -> None:
    """Medians with their quartiles."""
    every = [record for records in series.values() for record in records]
    cells, names = unique(record["cell"] for record in every), peers_of(every)
    lanes = [
        (marker, records, name) for marker, records in zip(MARKERS, series.values(), strict=False) for name in names
    ]
    for n, (marker, records, name) in enumerate(lanes):
        if found := [record for record in records if name in record["ratios"]]:
            y = np.array([cells.index(record["cell"]) for record in found]) + 0.8 * ((n + 0.5) / len(lanes) - 0.5)
            low, middle, high = np.array([record["ratios"][name] for record in found]).T
            spread = [middle - low, high - middle]
            ax.errorbar(middle, y, xerr=spread, fmt=marker, markersize=4, elinewidth=1, color=COLOURS[name])
    ax.axvline(1, color="black", linewidth=0.8)
    spreads = [ratio for record in every for name in peers_of([record]) for ratio in record["ratios"][name]]
    ax.set_xscale("log")
    ax.set_xlim(min(0.5, *spreads) * 0.9, max(2, *spreads) * 1.1)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xticks([], minor=True)
    ax.set_yticks(range(len(cells)), cells, fontsize=7)
    ax.invert_yaxis()
    ax.grid(axis="x", linewidth=0.3)
    ax.set_xlabel("our time / theirs (left of 1: ours is faster)", fontsize=8)


def draw_errors(chosen: list[Record]) -> Figure:
    """By margin: a panel for each format, of the loss and of the label's gradient."""
    formats = unique(record["dtype"] for record in chosen)
    figure = Figure(figsize=(9, 3.2 * len(formats)), layout="constrained")
    axes = figure.subplots(len(formats), 2, squeeze=False, sharex=True, sharey=True)
    for row, dtype in zip(axes, formats, strict=True):
        of_format = [record for record in chosen if record["dtype"] == dtype]
        for n, (ax, what) in enumerate(zip(row, ("loss", "the label's gradient"), strict=True)):
            for name in unique(name for record in of_format for name in record["errors"]):
                errors = [record["errors"][name][n] for record in of_format]
                margins = [record["margin"] for record in of_format]
                ax.plot(margins, errors, marker="o", markersize=3, label=name, color=COLOURS[name])
            ax.set_yscale("log")
            ax.grid(linewidth=0.3)
            ax.set_title(f"{what}, {dtype} logits", fontsize=10)
    for ax in axes[-1]:
        ax.set_xlabel("margin: the label's logit less the log-sum-exp of the others", fontsize=8)
    for ax in axes[:, 0]:
        ax.set_ylabel("relative error", fontsize=8)
    axes[0, 1].legend(fontsize=8)
    return figure
