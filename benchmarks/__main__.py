"""Side by side with the peers: `python -m benchmarks [part]`, all that is measured without a part.

    accuracy  errors of loss and gradient by margin
    logits    time and memory of losses and softmaxes over sizes, formats and kinds of labels
    linear    of the loss of x @ weight, with both gradients
    step      of a training step of a small model
    compiled  bytes that GPUs and TPUs move, of programs compiled for them without having one; not part of all
    tables    tables and pictures of the kept results once more

Every time is a ratio, taken in one process in turns (A B A B ...), after a warm-up, as the median over the turns with
the quartiles. Each cell is written into benchmarks/results, in a file named by the device and JAX's version, as soon as
it is measured. Then the tables of all results are printed, and put into README.md and docs/benchmarks.md, and the
pictures are drawn.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tqdm import tqdm

from benchmarks import accuracy, cases, pictures, report, results
from benchmarks.measure import QUICK, Pace

PARTS: dict[str, tuple[Callable, Callable]] = {  # the cases of each, and what measures one
    "accuracy": (accuracy.cases, accuracy.record),
    **{part: (partial(cases.cases, part), cases.record) for part in cases.KINDS},
}
PAGES = ["README.md", "docs/benchmarks.md"]


def measure(part: str, quick: bool, only: str, folder: Path) -> None:
    """Each cell is written as soon as it is there; no progress bar where nobody looks."""
    find, record = PARTS[part]
    chosen = [case for case in find(quick) if only in " ".join(map(str, (*case, case.cell)))]
    for case in tqdm(chosen, desc=part, disable=None):
        results.save(part, record(case, QUICK if quick else Pace()), folder)
    print(f"{part}: {len(chosen)} cells measured")


def publish(folder: Path, drawn: Path) -> dict[str, str]:
    """Draws the pictures of all results of a folder. Returns their tables by the names of their places."""
    kept = [results.load(path) for path in sorted(folder.glob("*.jsonl"))]
    pictures.draw(kept, drawn)
    return report.tables(kept)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=[*PARTS, "compiled", "tables"])
    parser.add_argument("--only", default="", help="the cells that hold this text; the others stay as they are kept")
    parser.add_argument("--quick", action="store_true", help="a smoke test of tiny sizes, written to out/quick")
    parser.add_argument("--out", type=Path, help="a folder for results and pictures; no page is changed")
    args = parser.parse_args(arguments)
    if args.part == "compiled":
        raise SystemExit(subprocess.call([sys.executable, "-m", "benchmarks.compiled", args.only], cwd=results.ROOT))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with PyTorch
    out = args.out or (results.ROOT / "out" / "quick" if args.quick else None)
    folder = out or results.KEPT
    for part in [] if args.part == "tables" else [args.part] if args.part else PARTS:
        measure(part, args.quick, args.only, folder)
    if not any(folder.glob("*.jsonl")):
        parser.error(f"no results in {folder}. Measure some first: python -m benchmarks")
    tables = publish(folder, (out or results.ROOT / "docs") / "pictures")
    for name, text in tables.items():
        print(f"\n{name}\n\n{text}")
        for page in PAGES if out is None else ():
            report.include(results.ROOT / page, name, text)


if __name__ == "__main__":
    main()
