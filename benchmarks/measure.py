"""Times in turns, their ratios, and compiled memory: every figure comes from here."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax

OURS, LIMIT = "softmax_jax", "limit"
K = TypeVar("K")


class Subject(NamedTuple):
    """A program on its operands, how to wait for its results, and how long its threads are busy after them."""

    run: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    spinning: float = 0.0  # seconds


class Pace(NamedTuple):
    """How long a cell may take: `turns`, or as many as fit into `seconds`, but at least `fewest`."""

    turns: int = 9
    seconds: float = 8.0
    fewest: int = 5
    shortest: float = 0.02  # seconds of one measurement: shorter programs run several times in it


class Limit(NamedTuple):
    """What a cell cannot beat: `count` times the time of a subject, or as many seconds."""

    one: Subject | float
    count: int = 1


def gpu() -> bool:
    return jax.devices()[0].platform == "gpu"


def seconds_of(subject: Subject, repeats: int) -> float:
    """Of one run. A GPU is kept busy and waited for once; a CPU runs one program at a time."""
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


def in_turns(subjects: dict[K, Subject], pace: Pace) -> dict[K, list[float]]:
    """Seconds of every subject, one measurement a turn (A B A B ...), after two runs of each for warmth."""
    for subject in subjects.values():
        subject.wait(subject.run())
    repeats = {name: max(1, math.ceil(pace.shortest / seconds_of(subject, 1))) for name, subject in subjects.items()}
    seconds: dict[K, list[float]] = {name: [] for name in subjects}
    start = time.perf_counter()
    for turn in range(1, pace.turns + 1):
        for name, subject in subjects.items():
            seconds[name].append(seconds_of(subject, repeats[name]))
            time.sleep(subject.spinning)
        if turn >= pace.fewest and time.perf_counter() - start > pace.seconds:
            break
    return seconds


def spread(numbers: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(numbers, n=4, method="inclusive")


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """The spread over the turns of our time over theirs in the same turn."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def compare(subjects: dict[str, Subject], pace: Pace, limit: Limit | None = None) -> dict[str, Any]:
    """Our time over each peer's, and the limit's over ours. Absolute times only of a GPU, which nobody shares."""
    one = None if limit is None else limit.one
    timed = {**subjects, LIMIT: one} if isinstance(one, Subject) else subjects
    seconds = in_turns(timed, pace)
    ours = seconds[OURS]
    record: dict[str, Any] = {
        "turns": len(ours),
        "ratios": {name: ratios(ours, seconds[name]) for name in subjects if name != OURS},
    }
    if limit is not None:
        least = [one] * len(ours) if isinstance(one, float) else seconds[LIMIT]
        record["limit"] = ratios([limit.count * a for a in least], ours)
    if gpu():
        record["milliseconds"] = {name: 1e3 * statistics.median(seconds[name]) for name in subjects}
    return record


def temporary_bytes(program: jax.stages.Compiled) -> int:
    """What the compiler reports beyond operands and results."""
    memory = program.memory_analysis()
    assert memory is not None, "this backend reports no memory"
    return memory.temp_size_in_bytes


def all_bytes(program: jax.stages.Compiled) -> int:
    """Operands, results and temporaries."""
    memory = program.memory_analysis()
    assert memory is not None, "this backend reports no memory"
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
