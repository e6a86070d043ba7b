"""Results as Markdown: a summary for the README, the aims, and every cell."""

import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.aims import aims, median_ratio
from benchmarks.measure import OURS
from benchmarks.peers import NAIVE, OPTAX
from benchmarks.results import Results, records

Record = dict[str, Any]
NONE = "-"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def quartiles(numbers: list[float] | None) -> str:
    return NONE if numbers is None else f"{numbers[1]:.2f} ({numbers[0]:.2f}-{numbers[2]:.2f})"


def mean_and_worst(numbers: list[float]) -> str:
    return f"{statistics.geometric_mean(numbers):.2f} ({max(numbers):.2f})" if numbers else NONE


def summary(results: Results, drawn: list[str]) -> str:
    """For the README."""
    shown = pictures(drawn, results)
    lines = [f"{heading(results)}; geometric mean over the grid (worst cell):", means(results), *shown]
    return "\n\n".join(line for line in lines if line)


def pictures(names: list[str], results: Results) -> list[str]:
    """Each with its caption, which says where it was measured."""
    captions = [PICTURES[Path(name).stem.split("-")[0]] for name in names]
    return [f"![{text}]({name})\n\n*{text} {heading(results)}.*" for name, text in zip(names, captions, strict=True)]


def means(results: Results) -> str:
    """One row a function and pass: the geometric mean over the grid, the worst cell in brackets."""
    timed = [record for part in ("logits", "linear", "step") for record in records(results, part)]
    kinds = dict.fromkeys((record["what"], record["passes"]) for record in timed)
    names = peers_of([record for record in timed if record["passes"] != "step"])
    others = [name for name in names if name not in (OPTAX, NAIVE)]
    rows = []
    for kind in kinds:
        chosen = [record for record in timed if (record["what"], record["passes"]) == kind]
        columns = [[OPTAX, NAIVE], *([name] for name in others)]
        cells = [[median_ratio(record, names) for record in chosen] for names in columns]
        rows.append([", ".join(kind), *(mean_and_worst([n for n in cell if n is not None]) for cell in cells)])
    return table(["our time over that of", "the best of Optax, jax.nn", *others], rows) if rows else ""


def peers_of(chosen: list[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in chosen for name in record.get("ratios", {})))


def times(chosen: list[Record]) -> str:
    names = peers_of(chosen)
    header = ["what", "cell", *(f"/ {name}" for name in names)]
    rows = [
        [
            f"{record['what']}, {record['passes']}",
            record["cell"],
            *(quartiles(record["ratios"].get(name)) for name in names),
        ]
        for record in chosen
    ]
    if any("limit" in record for record in chosen):
        header.append("limit / ours")
        rows = [[*row, quartiles(record.get("limit"))] for row, record in zip(rows, chosen, strict=True)]
    if any("milliseconds" in record for record in chosen):
        header.append("ours, ms")
        rows = [[*row, f"{r['milliseconds'][OURS]:.3g}"] for row, r in zip(rows, chosen, strict=True)]
    if any("memory" in record for record in chosen):
        header.append("memory of the step / Optax's")
        rows = [[*row, f"{record['memory'][OPTAX]:.2f}"] for row, record in zip(rows, chosen, strict=True)]
    return table(header, rows)


def memory(chosen: list[Record]) -> str:
    names = list(dict.fromkeys(name for record in chosen for name in record["temporary"]))
    rows = []
    for record in chosen:
        shares = {name: n / record["logits"] for name, n in record["temporary"].items()}
        columns = (f"{shares[name]:.3f}" if name in shares else NONE for name in names)
        rows.append([record["what"], record["cell"], f"{record['logits'] / 2**20:.0f}", *columns])
    return table(["what", "cell", "logits, MiB", *names], rows)


def few_margins(results: Results) -> str:
    """For the README: float32, without `jax.nn`, which is as Optax."""
    chosen = [
        {**record, "errors": {name: errors for name, errors in record["errors"].items() if name != NAIVE}}
        for record in records(results, "accuracy")
        if record["dtype"] == "float32" and record["margin"] in (0, 5, 10, 15, 20, 30, 60)
    ]
    return "\n\n".join([accuracy(chosen), source(results, "accuracy")]) if chosen else ""


def accuracy(chosen: list[Record]) -> str:
    """Errors of loss / of the label's gradient; 1e+00 is a result of 0."""
    names = list(dict.fromkeys(name for record in chosen for name in record["errors"]))
    rows = [
        [
            record["dtype"],
            str(record["margin"]),
            f"{record['loss']:.1e}",
            *(" / ".join(f"{e:.0e}" for e in record["errors"][name]) for name in names),
        ]
        for record in chosen
    ]
    return table(["dtype", "margin", "loss", *names], rows)


def growth(chosen: list[Record]) -> str:
    rows = [
        [
            record["what"],
            record["cell"],
            *(f"{record['slopes'][y][n]:.2f}" for y in ("time", "temporary") for n in names),
        ]
        for names in [(OURS, OPTAX)]
        for record in chosen
    ]
    header = [f"{y}, {name}" for y in ("time", "temporary bytes") for name in (OURS, OPTAX)]
    return table(["slope of", "tokens x embed x classes", *header], rows)


def of_aims(results: Results) -> str:
    rows = [
        [aim.text, f"{'>=' if aim.least else '<='} {aim.bound:g}", f"{aim.measured:.3g}", _yes(aim.met), aim.where]
        for aim in aims(results)
    ]
    return table(["aim", "bound", "measured", "met", "worst cell"], rows) if rows else ""


def _yes(met: bool) -> str:
    return "yes" if met else "**no**"


SECTIONS = {"logits": times, "linear": times, "step": times, "memory": memory, "growth": growth, "accuracy": accuracy}
CAPTIONS = {
    "logits": "Our time over each peer's (median, quartiles); limit: a fresh array written, on a GPU the bytes moved.",
    "linear": "Forward and both gradients; limit: three matrix products. The loss of tokamax 0.0.17 chunked is wrong "
    "where the classes are no multiple of 2048: it counts the zeros that it pads them with.",
    "step": "A whole training step: embedding, two layers, head, AdamW.",
    "memory": "Temporary bytes of the compiled program with gradients, in units of the logits.",
    "growth": "Exponents of time and temporary bytes against a size that grows by three decades.",
    "accuracy": "Relative errors of the loss / of the label's gradient, the worst of 512 rows; 1e+00 is a result of 0.",
}

PICTURES = {
    "logits": "Our time over each peer's, of logits: a dot a cell, with its quartiles.",
    "linear": "Our time over each peer's, of hidden states and a head, and of a training step.",
    "growth": "Time and temporary bytes against the number of tokens, and of classes.",
    "accuracy": "Relative error of the loss and of the label's gradient, by margin.",
}


def heading(results: Results) -> str:
    machine = results["machine"]
    cores = f"{machine['cores']} cores of {machine['processor']}"
    where = cores if machine["platform"] == "cpu" else machine["device"]
    return f"{'QUICK: sizes of a smoke test. ' if results['quick'] else ''}JAX {results['jax']}, {where}"


def page(results: Results, drawn: list[str]) -> str:
    """Everything that a file of results holds."""
    lines = [f"## {heading(results)}", means(results), of_aims(results), *pictures(drawn, results)]
    for part, section in SECTIONS.items():
        if chosen := records(results, part):
            lines += [f"### {part}", CAPTIONS[part], section(chosen), source(results, part)]
    return "\n\n".join(line for line in lines if line) + "\n"


def source(results: Results, part: str) -> str:
    """What was run, when and with what."""
    run = results["parts"][part]
    found = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    missing = "".join(f" {name} was absent: {why}." for name, why in run["absent"].items())
    older = Counter(record["date"] for record in run["records"] if record.get("date", run["date"]) != run["date"])
    missing += "".join(f" {number} cells are from {date}." for date, number in older.items())
    return f"(`python -m benchmarks {part}`, {run['date']}, load {run['load']}, {found}.{missing})"


def include(path: Path, name: str, text: str) -> None:
    """Put `text` between the two comments of that name, where the file has them."""
    pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
    before = path.read_text()
    path.write_text(re.sub(pattern, lambda found: found[1] + text + found[2], before, flags=re.DOTALL))
