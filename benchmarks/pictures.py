"""Draws ratios of times: one dot for each cell and peer."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from benchmarks.peers import JAX_NN, OPTAX, OPTAX_FLOAT32, TORCH
from benchmarks.report import heading, peers_of
from benchmarks.results import Record, Results

NAMES = [OPTAX, JAX_NN, TORCH, "tokamax", "tokamax chunked", "torch.compile", OPTAX_FLOAT32]
COLOURS = {name: f"C{n}" for n, name in enumerate(NAMES)}


def draw(results: Results, folder: Path, name: str) -> dict[str, str]:
    """Draws the parts that there are records of. Returns the pictures' addresses, by part, beside `folder`."""
    chosen = {
        "logits": results.of("logits"),
        "linear": results.of("linear") + results.of("step"),
    }
    drawn = {part: f"{part}-{name}.png" for part in chosen if chosen[part]}
    folder.mkdir(parents=True, exist_ok=True)
    for part, file in drawn.items():
        figure = draw_ratios(chosen[part])
        figure.suptitle(heading(results), fontsize=10)
        figure.savefig(folder / file, dpi=110)
    return {part: f"{folder.name}/{file}" for part, file in drawn.items()}


def draw_ratios(chosen: list[Record]) -> Figure:
    """One panel for each function and pass, one row for each cell, one dot with quartiles for each peer."""
    kinds: dict[str, list[Record]] = {}
    for record in chosen:
        kinds.setdefault(f"{record['what']}, {record['passes']}", []).append(record)
    columns, names = min(3, len(kinds)), peers_of(chosen)
    rows, height = -(-len(kinds) // columns), 1.2 + 0.24 * max(map(len, kinds.values()))
    figure = Figure(figsize=(columns * 4.6, rows * height + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for ax, (kind, of_kind) in zip(axes, kinds.items(), strict=False):
        draw_dots(ax, of_kind)
        ax.set_title(kind, fontsize=10)
    for ax in axes[len(kinds) :]:
        ax.set_axis_off()
    handles = [Line2D([], [], marker="o", color=COLOURS[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), fontsize=8)
    return figure


def draw_dots(ax: Axes, chosen: list[Record]) -> None:
    names = peers_of(chosen)
    for name in names:
        found = [(row, record["ratios"][name]) for row, record in enumerate(chosen) if name in record["ratios"]]
        y = np.array([row for row, _ in found]) + 0.12 * (names.index(name) - (len(names) - 1) / 2)
        low, middle, high = np.array([ratio for _, ratio in found]).T
        errors = [middle - low, high - middle]
        ax.errorbar(middle, y, xerr=errors, fmt="o", markersize=4, elinewidth=1, color=COLOURS[name])
    ax.axvline(1, color="black", linewidth=0.8)
    left, right = ax.get_xlim()
    ax.set_xlim(min(left, 0.45), max(right, 2.2))
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xticks([], minor=True)
    ax.set_yticks(range(len(chosen)), [record["cell"] for record in chosen], fontsize=7)
    ax.invert_yaxis()
    ax.grid(axis="x", linewidth=0.3)
    ax.set_xlabel("our time / theirs (left of 1: ours is faster)", fontsize=8)
