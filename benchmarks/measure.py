"""Times of several subjects, taken in turns in one process, and their ratios: every time comes from here."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

OURS = "softmax_jax"


class Subject(NamedTuple):
    """What is timed: a function without arguments, and how to wait for its results."""

    run: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    pause: float = 0.0  # seconds, after a measurement, for which its threads still occupy a core
    memory: int | None = None  # bytes, as the compiler reports them


class Pace(NamedTuple):
    """How long a cell may take: `turns`, or as many as fit into `seconds`, but at least `fewest`."""

    turns: int = 9
    seconds: float = 8.0
    fewest: int = 5
    shortest: float = 0.02  # seconds of one measurement: a shorter program runs several times in it


QUICK = Pace(turns=2, seconds=0, fewest=2, shortest=0)


def gpu() -> bool:
    return jax.devices()[0].platform == "gpu"


def seconds_per_run(subject: Subject, repeats: int) -> float:
    """A GPU is kept busy and waited for once; a CPU runs one program at a time."""
    start = time.perf_counter()
    if gpu():
        results = None
        for _ in range(repeats):
            results = subject.run()
        subject.wait(results)
    else:
        for _ in range(repeats):
            subject.wait(subject.run())
    return (time.perf_counter() - start) / repeats


def time_in_turns(subjects: dict[str, Subject], pace: Pace) -> dict[str, list[float]]:
    """Seconds of every subject, one measurement a turn (A B A B ...), after two runs of each as a warm-up."""
    for subject in subjects.values():
        subject.wait(subject.run())
    once = {name: seconds_per_run(subject, 1) for name, subject in subjects.items()}
    repeats = {name: max(1, math.ceil(pace.shortest / seconds)) for name, seconds in once.items()}
    times: dict[str, list[float]] = {name: [] for name in subjects}
    start = time.perf_counter()
    for turn in range(1, pace.turns + 1):
        for name, subject in subjects.items():
            times[name].append(seconds_per_run(subject, repeats[name]))
            time.sleep(subject.pause)
        if turn >= pace.fewest and time.perf_counter() - start > pace.seconds:
            break
    return times


def quartiles_of_ratio(numerator: list[float], denominator: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile of the ratios, each of two times from the same turn."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive")


def compare(subjects: dict[str, Subject], pace: Pace) -> dict[str, Any]:
    """Our time over that of each of the others. Absolute times only of a GPU, which nobody shares."""
    times = time_in_turns(subjects, pace)
    ours = times[OURS]
    record: dict[str, Any] = {
        "turns": len(ours),
        "ratios": {name: quartiles_of_ratio(ours, theirs) for name, theirs in times.items() if name != OURS},
    }
    if gpu():
        record["milliseconds"] = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    return record
