"""Time and temporary memory of loss and gradient against tokens and against classes, float32, with fitted slopes."""

import statistics
from typing import Any, NamedTuple

import numpy as np

from benchmarks import grid
from benchmarks.linear import arrays_of
from benchmarks.measure import OURS, Pace, Subject, in_turns, ratios, temporary_bytes
from benchmarks.peers import INTEGER, JAX, LINEAR, OPTAX
from benchmarks.subjects import GRADIENT, compiled

Shape = tuple[int, int, int]  # tokens, embed (0: the operand is the logits), classes


class Cell(NamedTuple):
    name: str  # function, the size that grows
    shapes: tuple[Shape, ...]


def cells(quick: bool) -> list[Cell]:
    return [Cell(*item) for item in (grid.QUICK_GROWTH if quick else grid.GROWTH).items()]


def record(cell: Cell, pace: Pace) -> dict[str, Any]:
    """All sizes of a curve take turns. Times are in units of ours at the largest size."""
    axis = 0 if cell.name.endswith("tokens") else 2
    sizes = [shape[axis] for shape in cell.shapes]
    subjects, temporary = {}, {}
    for name in (OURS, OPTAX):
        for size, shape in zip(sizes, cell.shapes, strict=True):
            subjects[name, size], temporary[name, size] = subject_of(name, shape)
    seconds = in_turns(subjects, pace)
    unit = seconds[OURS, sizes[-1]]
    time = {name: [_median_ratio(seconds[name, size], unit) for size in sizes] for name in (OURS, OPTAX)}
    memory = {name: [temporary[name, size] for size in sizes] for name in (OURS, OPTAX)}
    return {
        "what": cell.name,
        "passes": GRADIENT,
        "cell": name_of(cell.shapes[0], axis, sizes),
        "turns": len(unit),
        "sizes": sizes,
        "time": time,
        "temporary": memory,
        "slopes": {
            "time": {name: slope(sizes, numbers) for name, numbers in time.items()},
            "temporary": {name: slope(sizes, numbers) for name, numbers in memory.items()},
        },
        "ratios": {OPTAX: ratios(unit, seconds[OPTAX, sizes[-1]])},
    }


def name_of(shape: Shape, axis: int, sizes: list[int]) -> str:
    """Without the embed axis where there is none."""
    numbers = [f"{sizes[0]}...{sizes[-1]}" if i == axis else str(n) for i, n in enumerate(shape)]
    return " x ".join(number for number in numbers if number != "0")


def slope(sizes: list[int], numbers: list[float]) -> float:
    """p of numbers ~ sizes^p, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(numbers, 1e-9)), 1)[0])


def _median_ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def subject_of(name: str, shape: Shape) -> tuple[Subject, int]:
    operands = arrays_of(*shape, "float32")
    loss = JAX[LINEAR if shape[1] else INTEGER][name]
    program = compiled(loss, operands, len(operands) - 1, GRADIENT)
    return Subject(lambda: program(*operands)), temporary_bytes(program)
