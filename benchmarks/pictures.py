"""Results as pictures: a dot a cell and peer, errors by margin, growth with its slope."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from benchmarks.measure import OURS
from benchmarks.peers import WIDE
from benchmarks.results import Results, records
from benchmarks.show import heading, peers_of

Record = dict[str, Any]
NAMES = (OURS, "Optax", "jax.nn", "PyTorch", "tokamax", "tokamax chunked", "torch.compile", "Liger", "QuACK", WIDE)
COLOURS: dict[str, Any] = {name: f"C{n}" for n, name in enumerate(NAMES)}


def draw(results: Results, folder: Path, machine: str) -> list[str]:
    """The pictures that the results have records for; their names, which are the same for every version: logits-cpu."""
    drawings = {
        "logits": (ratios, records(results, "logits")),
        "linear": (ratios, records(results, "linear") + records(results, "step")),
        "growth": (growth, records(results, "growth")),
        "accuracy": (accuracy, records(results, "accuracy")),
    }
    names = []
    for name, (drawing, chosen) in drawings.items():
        if chosen:
            figure = drawing(chosen)
            figure.suptitle(heading(results), fontsize=10)
            names.append(f"{name}-{machine}.png")
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / names[-1], dpi=110)
    return names


def ratios(chosen: list[Record]) -> Figure:
    """A panel a function and pass, a row a cell, a dot a peer with its quartiles."""
    kinds = list(dict.fromkeys((record["what"], record["passes"]) for record in chosen))
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    cells = max(sum((r["what"], r["passes"]) == kind for r in chosen) for kind in kinds)
    figure, grid = _panels(rows, columns, (4.6, 1.2 + 0.24 * cells))
    for ax, kind in zip(grid.flat, kinds, strict=False):
        panel(ax, [record for record in chosen if (record["what"], record["passes"]) == kind])
        ax.set_title(", ".join(kind), fontsize=10)
    for ax in grid.flat[len(kinds) :]:
        ax.set_axis_off()
    _legend(figure, peers_of(chosen))
    return figure


def panel(ax: Axes, chosen: list[Record]) -> None:
    names = peers_of(chosen)
    for name in names:
        found = [(row, record["ratios"][name]) for row, record in enumerate(chosen) if name in record["ratios"]]
        y = np.array([row for row, _ in found]) + 0.12 * (names.index(name) - (len(names) - 1) / 2)
        low, middle, high = np.array([ratio for _, ratio in found]).T
        spread = [middle - low, high - middle]
        ax.errorbar(middle, y, xerr=spread, fmt="o", markersize=4, elinewidth=1, color=COLOURS[name])
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_xscale("log")
    ax.set_xticks(_ticks(ax.get_xlim()), minor=False)
    ax.set_xticks([], minor=True)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_yticks(range(len(chosen)), [record["cell"] for record in chosen], fontsize=7)
    ax.invert_yaxis()
    ax.grid(axis="x", linewidth=0.3)
    ax.set_xlabel("our time / theirs (left of 1: ours is faster)", fontsize=8)


def _ticks(limits: tuple[float, float]) -> list[float]:
    """1, 2 and 5 times a power of ten; of a narrow range, even steps."""
    known = [m * 10.0**e for e in range(-3, 3) for m in (1, 2, 5)]
    for ticks in (known, MaxNLocator(6).tick_values(*limits)):
        found = [tick for tick in ticks if limits[0] <= tick <= limits[1]]
        if len(found) >= 3:
            return found
    return [1.0]


def growth(chosen: list[Record]) -> Figure:
    """Time above, temporary bytes below, a column a curve; in brackets the fitted slope."""
    figure, grid = _panels(2, len(chosen), (3.6, 3.0))
    labels = ("time, ours at the largest = 1", "temporary bytes")
    for row, (y, label) in enumerate(zip(("time", "temporary"), labels, strict=True)):
        for ax, record in zip(grid[row], chosen, strict=True):
            for name, numbers in record[y].items():
                text = f"{name} (slope {record['slopes'][y][name]:.2f})"
                ax.loglog(record["sizes"], np.maximum(numbers, 1e-9), "o-", color=COLOURS[name], label=text)
            ax.set_title(f"{record['what']}\n{record['cell']}", fontsize=8)
            ax.set_xlabel(record["what"].split(", ")[1], fontsize=8)
            ax.set_ylabel(label, fontsize=8)
            ax.legend(fontsize=7)
            ax.grid(linewidth=0.3)
    return figure


def accuracy(chosen: list[Record]) -> Figure:
    """Loss and gradient in columns, a row a dtype; a result of 0 has error 1."""
    dtypes = list(dict.fromkeys(record["dtype"] for record in chosen))
    names = list(dict.fromkeys(name for record in chosen for name in record["errors"]))
    figure, grid = _panels(len(dtypes), 2, (4.6, 3.0))
    for row, dtype in enumerate(dtypes):
        found = [record for record in chosen if record["dtype"] == dtype]
        for column, quantity in enumerate(("loss", "the label's gradient")):
            ax = grid[row, column]
            for name in names:
                errors = [max(record["errors"][name][column], 1e-9) for record in found]
                ax.semilogy([record["margin"] for record in found], errors, ".-", color=COLOURS[name], linewidth=1)
            ax.set_title(f"{quantity}, {dtype}", fontsize=9)
            ax.set_xlabel("margin, nats", fontsize=8)
            ax.set_ylabel("relative error", fontsize=8)
            ax.grid(linewidth=0.3)
    _legend(figure, names)
    return figure


def _panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(columns * size[0], rows * size[1] + 0.8), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _legend(figure: Figure, names: list[str]) -> None:
    handles = [Line2D([], [], marker="o", color=COLOURS[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), fontsize=8)
