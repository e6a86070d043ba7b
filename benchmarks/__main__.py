"""Side by side with the peers: `python -m benchmarks [part]`, everything without a part.

    logits    losses and softmaxes over sizes, dtypes and kinds of labels
    linear    x @ weight and its loss, with both gradients
    step      a training step of a small model
    memory    temporary bytes of the compiled programs
    growth    time and memory against tokens and classes
    accuracy  errors of loss and gradient by margin
    scaling   the table of docs/scaling.md, by formulas
    compiled  bytes that GPUs and TPUs move, of programs compiled for them, without having one (not part of everything)
    tables    tables and pictures of kept results once more

Every time is a ratio, taken in one process in turns (A B A B ...), after a warm-up, as the median over the turns with
the quartiles. A part replaces its own records in benchmarks/results (with --only those it makes), then tables and
pictures are made anew. Peers that are not installed are left out, with the reason.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from benchmarks import accuracy, growth, linear, logits, memory, pictures, results, scaling, show, step
from benchmarks.measure import Pace

PARTS = {
    "accuracy": accuracy,
    "memory": memory,
    "logits": logits,
    "linear": linear,
    "step": step,
    "growth": growth,
}
PAGE = """# Benchmarks

Ratios of our time to another library's, measured in one process in turns, as medians with their quartiles: smaller is
better, and below 1 ours is faster. Every cell is here, the lost ones too. Made by `python -m benchmarks`; the numbers
are in `benchmarks/results`.

"""


def run(part: str, args: argparse.Namespace, pace: Pace, folder: Path) -> dict:
    """A part's results, each cell written as soon as it is there; no progress bar where nobody looks."""
    cells = [cell for cell in PARTS[part].cells(args.quick) if args.only in " ".join(map(str, cell))]
    if not cells:
        raise SystemExit(
            f"no cell of {part} holds --only {args.only!r}; the cells are {PARTS[part].cells(args.quick)}."
        )
    done, fresh = [], results.empty(args.quick)
    for cell in tqdm(cells, desc=part, disable=None):
        done.append(PARTS[part].record(cell, pace))
        fresh["parts"][part] = results.part_of(done)
        merged = results.merge(fresh, folder / results.file_name(fresh), whole=not args.only)
    return {**merged, "parts": fresh["parts"]}


def publish(folder: Path, docs: Path) -> dict[str, str]:
    """Pictures and tables of all results in `folder`; what the README has of them, by the names of its places."""
    pages, summaries, errors = [], {"gpu": [], "cpu": []}, []
    kept = [results.load(path) for path in sorted(folder.glob("*.json"))]
    for found in sorted(kept, key=lambda found: found["machine"]["platform"] == "cpu"):
        of_platform = summaries[platform := found["machine"]["platform"]]
        machine = f"{platform}-{len(of_platform) + 1}" if of_platform else platform
        names = [f"pictures/{name}" for name in pictures.draw(found, docs / "pictures", machine)]
        pages.append(show.page(found, names))
        of_platform.append(show.summary(found, [f"{docs.name}/{name}" for name in names if "logits-" in name]))
        errors.append(show.few_margins(found))
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "benchmarks.md").write_text(PAGE + "\n".join(pages))
    texts = {**summaries, "accuracy": filter(None, errors)}
    return {name: next(iter(of), "").strip() for name, of in texts.items()}  # the first card's; the page has all


PAGES = results.ROOT / "README.md", results.ROOT / "docs" / "performance_notes.md"
DEVICES = ["H200", "H100", "B200", "A100", "TPU v5e", "TPU v5p", "TPU v6e"]
WITH_HEADS = ["H200", "H100"]
WITH_SIZES = ["H200", "TPU v6e"]
SHORT = ["H100", "A100", "TPU v5e", "TPU v6e"]
SHORT_CASES = [
    "integer labels, forward",
    "integer labels, with gradient",
    "dense labels, with gradient",
    "integer labels, with gradient, accuracy, log-normalizer",
    "KL from logits, with gradient",
    "softmax, gradient",
]


def publish_tables(tables: dict[str, str]) -> None:
    """Each in its place, on the pages that have one."""
    for page in PAGES:
        for name, text in tables.items():
            show.include(page, name, text)


def of_compiled(part: str, devices: list[str]) -> dict[str, dict]:
    """What benchmarks/compiled.py finds, which wants a process of its own."""
    command = [sys.executable, "-m", "benchmarks.compiled", part, *devices]
    run = subprocess.run(command, cwd=results.ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout)


def compiled() -> dict[str, str]:
    """Tables, by the names of their places."""
    moved = lambda pair: " / ".join("-" if cost is None else f"{cost[1]:.1f}" for cost in pair)  # noqa: E731
    need = lambda costs: " / ".join(f"{mib:.0f}" for mib, _ in costs)  # noqa: E731
    take = lambda costs: " / ".join(f"{ms:.3g}" for _, ms in costs)  # noqa: E731
    logits, heads, sizes, attention = (
        of_compiled("logits", DEVICES),
        of_compiled("heads", WITH_HEADS),
        of_compiled("sizes", WITH_SIZES),
        of_compiled("attention", DEVICES),
    )
    rows = lambda cases, devices: [[case, *(moved(logits[d][case]) for d in devices)] for case in cases]  # noqa: E731
    tables = {
        "compiled": show.table(["", *SHORT], rows(SHORT_CASES, SHORT)),
        "moved": show.table(["", *logits], rows(logits["H200"], logits)),
    }
    of_sizes = {f"{d}, {size}": cases for d, by_size in sizes.items() for size, cases in by_size.items()}
    rows_of_sizes = [
        [case, *(moved(cases[case]) if case in cases else "-" for cases in of_sizes.values())]
        for case in logits["H200"]
    ]
    tables["sizes"] = show.table(["", *of_sizes], rows_of_sizes)
    memory = lambda pair: " / ".join(f"{cost[2]:.1f}" for cost in pair)  # noqa: E731
    rows_of_attention = [
        [f"{dtype}, {what}", *(told(of[dtype]) for of in attention.values())]
        for dtype in ("bfloat16", "float32")
        for what, told in (("bytes moved", moved), ("temporary memory", memory))
    ]
    tables["attention"] = show.table(["", *attention], rows_of_attention)
    header = ["tokens x embed x classes", *(f"{d}, {unit}" for unit in ("MiB", "ms") for d in heads)]
    costs = [[head, *(told(of[head]) for told in (need, take) for of in heads.values())] for head in heads["H200"]]
    return tables | {"heads": show.table(header, costs)}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=[*PARTS, "scaling", "compiled", "tables"])
    parser.add_argument("--turns", type=int, default=Pace().turns, help="measurements of every subject")
    parser.add_argument(
        "--seconds", type=float, default=Pace().seconds, help=f"of a cell, from turn {Pace().fewest} on"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two turns: a smoke test")
    parser.add_argument("--only", default="", help="of a part, the cells that hold this text; the others stay as kept")
    parser.add_argument("--out", type=Path, help="a folder for JSON, tables and pictures, instead of the kept ones")
    args = parser.parse_args(arguments)
    if args.turns < 2:
        parser.error("--turns must be at least 2")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.part == "scaling":
        return print(show.table(scaling.HEADER, scaling.table()))
    if args.part == "compiled":
        tables = compiled()
        print(*tables.values(), sep="\n\n")
        return publish_tables(tables)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with PyTorch
    pace = Pace(2, 0, 2, 0) if args.quick else Pace(args.turns, args.seconds, min(args.turns, Pace().fewest))
    out = args.out or (results.ROOT / "out" / "quick" if args.quick else None)
    folder = out or results.KEPT
    for part in [] if args.part == "tables" else [args.part] if args.part else PARTS:
        print(show.page(run(part, args, pace, folder), []))
    summaries = publish(folder, out or results.ROOT / "docs")
    if out is None:
        publish_tables(summaries)


if __name__ == "__main__":
    main()
