"""The aims, and whether results meet them."""

import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks.measure import OURS
from benchmarks.peers import DENSE, INTEGER, NAIVE, OPTAX, TORCH
from benchmarks.results import Results, records
from benchmarks.subjects import FORWARD, GRADIENT

Record = dict[str, Any]

LARGE_LOGITS = 256e6  # bytes from which a linear loss must be small
GPU_SHAPE = "8192 x 4096 x 128256 bfloat16"


class Aim(NamedTuple):
    text: str
    bound: float
    measured: float
    where: str = ""  # the worst cell
    least: bool = False  # the bound is a lower one

    @property
    def met(self) -> bool:
        return self.measured >= self.bound if self.least else self.measured <= self.bound


def median_ratio(record: Record, peers: Iterable[str]) -> float | None:
    """Our time over that of the best of these peers; None where the record has none of them."""
    found = [record["ratios"][name][1] for name in peers if name in record["ratios"]]
    return max(found) if found else None


def aims(results: Results) -> list[Aim]:
    if results["machine"]["platform"] == "gpu":
        return _on_a_gpu(results)
    return [*_of_times(results), *_of_linear(results), *_of_memory(results)]


def _of_times(results: Results) -> list[Aim]:
    losses = [record for record in records(results, "logits") if record["what"] in (INTEGER, DENSE)]
    found = []
    for passes, mean, worst in ((GRADIENT, 0.85, 1.05), (FORWARD, 0.8, 1.3)):
        chosen = [record for record in losses if record["passes"] == passes]
        found += _mean_and_worst(f"logits, {passes}, of the best of Optax and jax.nn", chosen, mean, worst)
    return found + _mean_and_worst("logits, of PyTorch", losses, 0.7, None, [TORCH])


def _mean_and_worst(
    text: str, chosen: list[Record], mean: float, worst: float | None, peers: Iterable[str] = (OPTAX, NAIVE)
) -> list[Aim]:
    numbers = {_where(record): ratio for record in chosen if (ratio := median_ratio(record, peers)) is not None}
    if not numbers:
        return []
    found = [Aim(f"{text}: geometric mean", mean, statistics.geometric_mean(numbers.values()))]
    return found if worst is None else [*found, _worst(f"{text}: worst cell", worst, numbers)]


def _of_linear(results: Results) -> list[Aim]:
    numbers = {_where(record): record["ratios"][OPTAX][1] for record in records(results, "linear")}
    return [_worst("linear, of optax(x @ W): worst cell", 0.95, numbers)] if numbers else []


def _of_memory(results: Results) -> list[Aim]:
    plain, linear = {}, {}
    for record in records(results, "memory"):
        temporary, logits = record["temporary"], record["logits"]
        if record["what"] != "linear":
            plain[_where(record)] = temporary[OURS] / logits
        elif logits > LARGE_LOGITS:
            linear[_where(record)] = temporary[OURS] / temporary[OPTAX]
    found = [_worst("temporary bytes, of the logits: worst cell", 0.05, plain)] if plain else []
    return [*found, _worst("linear, temporary bytes, of optax(x @ W): worst cell", 0.25, linear)] if linear else found


def _on_a_gpu(results: Results) -> list[Aim]:
    shares = {
        _where(record): record["limit"][1]
        for record in records(results, "logits")
        if (record["what"], record["passes"]) == (INTEGER, GRADIENT)
    }
    found = []
    if shares:
        lowest = min(shares, key=shares.__getitem__)
        text = "logits, forward + gradient, share of copy bandwidth: worst cell"
        found.append(Aim(text, 0.85, shares[lowest], lowest, least=True))
    for record in records(results, "linear"):
        if record["cell"] == GPU_SHAPE:
            found.append(Aim(f"linear {GPU_SHAPE}: ms", 36, record["milliseconds"][OURS]))
    for record in records(results, "memory"):
        if record["cell"] == GPU_SHAPE:
            found.append(Aim(f"linear {GPU_SHAPE}: GiB of temporaries", 2, record["temporary"][OURS] / 2**30))
    return found


def _worst(text: str, bound: float, numbers: dict[str, float]) -> Aim:
    where = max(numbers, key=numbers.__getitem__)
    return Aim(text, bound, numbers[where], where)


def _where(record: Record) -> str:
    return f"{record['what']}, {record['passes']}, {record['cell']}"
