"""Results as Markdown: the tables of README.md and docs/benchmarks.md, where each lies between two comments."""

import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks.measure import OURS
from benchmarks.peers import COMPILED, JAX_NN, OPTAX, OPTAX_FLOAT32, TOKAMAX, TORCH, YARDSTICKS
from benchmarks.results import Record, Results

TIMED = ("logits", "linear", "step")
OF = "our time over that of"
BEST = [OPTAX, JAX_NN]
FEW = 16  # classes
MARGINS = (0, 5, 10, 15, 20, 60)
NONE = "-"


def tables(kept: list[Results]) -> dict[str, str]:
    """Every table that these results have, by the name of its place."""
    gpus, cpus, told = timed_on(kept, "gpu"), timed_on(kept, "cpu"), with_errors(kept)
    made = {
        "gpus": [by_function(gpus)] if gpus else [],
        "heads": [by_size(gpus)] if any(gpu.of("linear") for gpu in gpus) else [],
        "cpus": [f"{by_format(cpu)}\n\n({source(cpu, timed(cpu))})" for cpu in cpus],
        "accuracy": [f"{by_margin(found)}\n\n({source(found, found.of('accuracy'))})" for found in told[:1]],
    }
    return {name: "\n\n".join(texts) for name, texts in made.items() if texts}


def include(path: Path, name: str, text: str) -> None:
    """Puts `text` between the two comments of that name, where the file has them."""
    pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
    before = path.read_text()
    path.write_text(re.sub(pattern, lambda place: place[1] + text + place[2], before, flags=re.DOTALL))


def by_function(gpus: list[Results]) -> str:
    """One row for each function and pass. Of PyTorch each of the two figures is the larger of the cards'."""
    every = [timed(gpu) for gpu in gpus]
    rows = []
    for kind in kinds(record for records in every for record in records):
        cards = [of_kind(records, kind) for records in every]
        best = [mean_and_worst(card, BEST) for card in cards]
        others = [[mean_and_worst(card, [name]) for card in cards] for name in (TORCH, COMPILED)]
        larger = [tuple(map(max, zip(*filter(None, of), strict=True))) for of in others]
        rows.append([kind, *map(shown, [*best, *larger])])
        if any(mean_and_worst(card, [OPTAX_FLOAT32]) for card in cards):
            of_float32 = [shown(mean_and_worst(card, [OPTAX_FLOAT32])) for card in cards]
            rows.append([f"{kind}, {OPTAX_FLOAT32.replace(',', ' on')}", *of_float32, NONE, NONE])
    names = [f"Optax or `jax.nn`, {short(gpu, gpus)}" for gpu in gpus]
    return table([OF, *names, TORCH, f"`{COMPILED}`"], rows)


def by_size(gpus: list[Results]) -> str:
    """One row for each head, a figure for each card."""
    of_cards = [{record["cell"].removesuffix(" bfloat16"): record for record in gpu.of("linear")} for gpu in gpus]
    peers = (OPTAX, OPTAX_FLOAT32, TORCH, COMPILED)
    rows = []
    for cell in unique(cell for card in of_cards for cell in card):
        found = [card.get(cell, {}) for card in of_cards]
        milliseconds = [f"{record['milliseconds'][OURS]:.3g}" if record else NONE for record in found]
        ratios = [[record.get("ratios", {}).get(name) for record in found] for name in peers]
        medians = [[f"{quartiles[1]:.2f}" if quartiles else NONE for quartiles in of] for of in ratios]
        rows.append([cell, *(" / ".join(texts) for texts in (milliseconds, *medians))])
    cards = " / ".join(short(gpu, gpus) for gpu in gpus)
    over = ["over Optax", f"over {OPTAX_FLOAT32}", f"over {TORCH}", f"over `{COMPILED}`"]
    return table([f"tokens x width x classes, {cards}", "ours, ms", *over], rows)


def by_format(cpu: Results) -> str:
    """One row for each function and pass, a figure for each format."""
    formats = unique(record["cell"].split()[-1] for record in timed(cpu))
    rows = []
    for kind in kinds(timed(cpu)):
        chosen = of_kind(timed(cpu), kind)
        of_format = [[record for record in chosen if record["cell"].endswith(f" {dtype}")] for dtype in formats]
        best, torch, tokamax = (
            [mean_and_worst(records, names) for records in of_format] for names in (BEST, [TORCH], [TOKAMAX])
        )
        rows.append([kind, *map(shown, [*best, *torch])])
        if any(tokamax):
            rows.append([f"{kind}, {TOKAMAX}", *map(shown, tokamax), *[NONE] * len(formats)])
    return table([OF, *(f"{peer}, {dtype}" for peer in ("Optax or `jax.nn`", TORCH) for dtype in formats)], rows)


def by_margin(results: Results) -> str:
    """Of float32 at a few margins, without `jax.nn`, whose errors are those of Optax."""
    chosen = [r for r in results.of("accuracy") if r["dtype"] == "float32" and r["margin"] in MARGINS]
    names = [name for name in unique(name for record in chosen for name in record["errors"]) if name != JAX_NN]
    rows = []
    for record in chosen:
        errors = [" / ".join(f"{error:.0e}" for error in record["errors"][name]) for name in names]
        rows.append([str(record["margin"]), f"{record['loss']:.1e}", *errors])
    return table(["margin", "loss", *names], rows)


# What the tables are made of.


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def pivot(entries: dict[tuple[str, str], str], corner: str) -> str:
    """A table of texts by (row, column)."""
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*entries, strict=True))
    return table([corner, *columns], [[row, *(entries.get((row, column), NONE) for column in columns)] for row in rows])


def timed(results: Results) -> list[Record]:
    return [record for part in TIMED for record in results.of(part)]


def timed_on(kept: list[Results], platform: str) -> list[Results]:
    return [found for found in kept if found.machine["platform"] == platform and timed(found)]


def with_errors(kept: list[Results]) -> list[Results]:
    """Those that have errors by margin, of which the first is shown: CPUs come before GPUs."""
    return sorted((of for of in kept if of.of("accuracy")), key=lambda of: of.machine["platform"])


def kind_of(record: Record) -> str:
    """The function and the pass; few classes are a kind of their own."""
    few = int(record["cell"].split()[-2]) <= FEW
    return ", ".join([record["what"], record["passes"], *([f"up to {FEW} classes"] if few else [])])


def kinds(chosen: Iterable[Record]) -> list[str]:
    """Those of few classes behind the others."""
    return sorted(unique(map(kind_of, chosen)), key=lambda kind: kind.endswith(f"up to {FEW} classes"))


def of_kind(chosen: list[Record], kind: str) -> list[Record]:
    return [record for record in chosen if kind_of(record) == kind]


def mean_and_worst(chosen: list[Record], names: list[str]) -> tuple[float, float] | None:
    """Of our time over that of the fastest of these peers in each cell: the geometric mean, and the worst cell's."""
    ratios = [[record["ratios"][name][1] for name in names if name in record["ratios"]] for record in chosen]
    of_fastest = [max(found) for found in ratios if found]
    return (statistics.geometric_mean(of_fastest), max(of_fastest)) if of_fastest else None


def shown(figures: tuple[float, ...] | None) -> str:
    return f"{figures[0]:.2f} ({figures[1]:.2f})" if figures else NONE


def peers_of(chosen: list[Record]) -> list[str]:
    return unique(name for record in chosen for name in record["ratios"] if name not in YARDSTICKS)


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def heading(results: Results) -> str:
    return f"JAX {results.machine['jax']}, {where(results)}"


def where(results: Results) -> str:
    machine = results.machine
    cores = f"{machine['cores']} cores of {machine['processor']}"
    return cores if machine["platform"] == "cpu" else machine["device"]


def short(gpu: Results, among: list[Results]) -> str:
    """H100, of NVIDIA H100 80GB HBM3; with JAX's version where there are several."""
    cards = [re.sub(r"^NVIDIA | \d+GB.*$", "", of.machine["device"]) for of in among]
    card = cards[among.index(gpu)]
    return card if cards.count(card) == 1 else f"{card}, JAX {gpu.machine['jax']}"


def source(results: Results, chosen: list[Record]) -> str:
    """Says where and when these were measured, and with which versions."""
    first, last = min(record["date"] for record in chosen), max(record["date"] for record in chosen)
    newest = max(chosen, key=lambda record: record["date"])
    versions = ", ".join(f"{name} {number}" for name, number in newest["versions"].items() if name != "jaxlib")
    return f"{where(results)}, {first if first == last else f'{first} to {last}'}, {versions}"
