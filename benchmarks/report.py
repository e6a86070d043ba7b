"""Results as Markdown: what README.md shows of them, and docs/benchmarks.md, which has every cell."""

import re
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.measure import OURS
from benchmarks.peers import JAX_NN, OPTAX, YARDSTICKS
from benchmarks.results import Record, Results

TIMED = ("logits", "linear", "step")
NONE = "-"
CAPTIONS = {
    "logits": "Our time over each peer's (median, quartiles), and over that of writing a fresh array like the logits, "
    "on a GPU of copying them (until 2026-11-27 at the rate of a copy of 1 GiB): a loss with its gradient takes 1 of "
    "the former at least, 1.5 of the latter. Memory: temporary bytes of the compiled program, in units of the logits.",
    "linear": "Forward and both gradients, which are three products like `x @ weight` (on a GPU until 2026-11-27 at "
    "the rate of 8192 x 8192 x 8192); memory as above. The loss of tokamax 0.0.17 chunked is wrong where the classes "
    "are no multiple of 2048: it counts the zeros that it pads them with.",
    "step": "A whole training step: embedding, two layers, head, AdamW. Memory: all that the step needs, in units of "
    "the step with Optax's loss.",
    "accuracy": "Relative errors of the loss / of the label's gradient, the worst of 512 rows; 1e+00 is a result of 0.",
}
PICTURES = {
    "logits": "Our time over each peer's, of logits: a dot a cell, with its quartiles.",
    "linear": "Our time over each peer's, of hidden states and a head, and of a training step.",
}


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def pivot(entries: dict[tuple[str, str], str]) -> str:
    """A table of texts by (row, column)."""
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*entries, strict=True))
    return table(["", *columns], [[row, *(entries.get((row, column), NONE) for column in columns)] for row in rows])


def page(results: Results, drawn: dict[str, str]) -> str:
    """Shows everything that a file of results holds; `drawn` has the addresses of its pictures, by part."""
    parts = [f"## {heading(results)}", means(results), *(picture(results, part, drawn[part]) for part in drawn)]
    for part, caption in CAPTIONS.items():
        if chosen := results.of(part):
            cells = times_table(chosen) if part in TIMED else accuracy_table(chosen)
            parts += [f"### {part}", caption, cells, source(chosen)]
    return "\n\n".join(part for part in parts if part) + "\n"


def heading(results: Results) -> str:
    machine = results.machine
    cores = f"{machine['cores']} cores of {machine['processor']}"
    return f"JAX {machine['jax']}, {cores if machine['platform'] == 'cpu' else machine['device']}"


def picture(results: Results, part: str, address: str) -> str:
    """A picture and its caption, which says where it was measured."""
    return f"![{PICTURES[part]}]({address})\n\n*{PICTURES[part]} {heading(results)}.*"


def source(chosen: list[Record]) -> str:
    """Says what was run, when and with what: of the newest record of a part, and how many are older."""
    newest = max(chosen, key=lambda record: record["date"])
    versions = ", ".join(f"{name} {number}" for name, number in newest["versions"].items())
    dates = Counter(record["date"] for record in chosen if record["date"] != newest["date"])
    older = "".join(f" {number} cells are from {date}." for date, number in dates.items())
    return f"(`python -m benchmarks {newest['part']}`, {newest['date']}, load {newest['load']}, {versions}.{older})"


def means(results: Results) -> str:
    """One row for each function and pass: the geometric mean over the sizes, and the worst cell in brackets."""
    timed = [record for part in TIMED for record in results.of(part)]
    kinds = dict.fromkeys((record["what"], record["passes"]) for record in timed)
    others = [name for name in peers_of(timed) if name not in (OPTAX, JAX_NN)]
    rows = []
    for kind in kinds:
        chosen = [record for record in timed if (record["what"], record["passes"]) == kind]
        columns = [best_ratios(chosen, names) for names in ([OPTAX, JAX_NN], *([name] for name in others))]
        cells = [f"{statistics.geometric_mean(n):.2f} ({max(n):.2f})" if n else NONE for n in columns]
        rows.append([", ".join(kind), *cells])
    return table(["our time over that of", "the best of Optax, jax.nn", *others], rows) if rows else ""


def best_ratios(chosen: list[Record], names: list[str]) -> list[float]:
    """Our time over that of the fastest of these peers, for each record that has one of them."""
    ratios = [[record["ratios"][name][1] for name in names if name in record["ratios"]] for record in chosen]
    return [max(found) for found in ratios if found]


def peers_of(chosen: list[Record]) -> list[str]:
    return unique(name for record in chosen for name in record["ratios"] if name not in YARDSTICKS)


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def times_table(chosen: list[Record]) -> str:
    """One row for each cell: our time over each peer's and the yardstick's, milliseconds on a GPU, memory."""
    names = unique(name for record in chosen for name in record["ratios"])
    columns = {f"/ {name}": [quartiles(record["ratios"].get(name)) for record in chosen] for name in names}
    columns["ours, ms"] = [f"{r['milliseconds'][OURS]:.3g}" if "milliseconds" in r else NONE for r in chosen]
    for name in unique(name for record in chosen for name in record.get("memory", {})):
        memory = [record.get("memory", {}).get(name) for record in chosen]
        columns[f"memory, {name}"] = [NONE if number is None else f"{number:.3f}" for number in memory]
    columns = {name: column for name, column in columns.items() if set(column) != {NONE}}
    kinds = [[f"{record['what']}, {record['passes']}", record["cell"]] for record in chosen]
    rows = [[*kind, *row] for kind, row in zip(kinds, zip(*columns.values(), strict=True), strict=True)]
    return table(["what", "cell", *columns], rows)


def quartiles(numbers: list[float] | None) -> str:
    return NONE if numbers is None else f"{numbers[1]:.2f} ({numbers[0]:.2f}-{numbers[2]:.2f})"


def accuracy_table(chosen: list[Record]) -> str:
    names = unique(name for record in chosen for name in record["errors"])
    rows = []
    for record in chosen:
        errors = [" / ".join(f"{error:.0e}" for error in record["errors"][name]) for name in names]
        rows.append([record["dtype"], str(record["margin"]), f"{record['loss']:.1e}", *errors])
    return table(["dtype", "margin", "loss", *names], rows)


# What README.md shows.


def summary(results: Results, drawn: dict[str, str]) -> str:
    shown = [picture(results, part, drawn[part]) for part in drawn if part == "logits"]
    return "\n\n".join([f"{heading(results)}; geometric mean over the grid (worst cell):", means(results), *shown])


def few_margins(results: Results) -> str:
    """The table of float32 at a few margins, without `jax.nn`, whose errors are those of Optax."""
    chosen = [
        {**record, "errors": {name: errors for name, errors in record["errors"].items() if name != JAX_NN}}
        for record in results.of("accuracy")
        if record["dtype"] == "float32" and record["margin"] in (0, 5, 10, 15, 20, 30, 60)
    ]
    return "\n\n".join([accuracy_table(chosen), source(results.of("accuracy"))])


def include(path: Path, name: str, text: str) -> None:
    """Puts `text` between the two comments of that name, where the file has them."""
    pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
    before = path.read_text()
    path.write_text(re.sub(pattern, lambda place: place[1] + text + place[2], before, flags=re.DOTALL))
