"""Side by side with the peers: `python -m benchmarks [part]`, all that is measured without a part.

    accuracy  errors of loss and gradient by margin
    logits    time and memory of losses and softmaxes over sizes, formats and kinds of labels
    linear    of the loss of x @ weight, with both gradients
    step      of a training step of a small model
    compiled  bytes that GPUs and TPUs move, of programs compiled for them without having one; not part of all
    tables    tables and pictures of the kept results once more

Every time is a ratio, taken in one process in turns (A B A B ...), after a warm-up, as the median over the turns with
the quartiles. Each cell is written into benchmarks/results, in a file named by the device and JAX's version, as soon as
it is measured; then docs/benchmarks.md, the tables of README.md and the pictures are made of all results.
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
PAGE = """# Benchmarks

Ratios of our time to another library's, measured in one process in turns, as medians with their quartiles: smaller is
better, and below 1 ours is faster. Every cell is here, the lost ones too. Made by `python -m benchmarks`; the numbers
are in `benchmarks/results`.

"""


def measure(part: str, quick: bool, only: str, folder: Path) -> None:
    """Each cell is written as soon as it is there; no progress bar where nobody looks."""
    find, record = PARTS[part]
    chosen = [case for case in find(quick) if only in " ".join(map(str, (*case, case.cell)))]
    for case in tqdm(chosen, desc=part, disable=None):
        results.save(part, record(case, QUICK if quick else Pace()), folder)
    print(f"{part}: {len(chosen)} cells measured")


def publish(folder: Path, docs: Path) -> dict[str, str]:
    """Writes the page and the pictures of all results. Returns what README.md has of them: the first of each."""
    pages, summaries = [], {}
    kept = [(path.stem, results.load(path)) for path in sorted(folder.glob("*.jsonl"))]
    for name, found in sorted(kept, key=lambda named: named[1].machine["platform"] == "cpu"):
        drawn = pictures.draw(found, docs / "pictures", name)
        pages.append(report.page(found, drawn))
        if found.machine["platform"] == "gpu":
            summaries.setdefault("gpu", report.summary(found, {part: f"docs/{file}" for part, file in drawn.items()}))
        if found.of("accuracy"):
            summaries.setdefault("accuracy", report.few_margins(found))
    (docs / "benchmarks.md").write_text(PAGE + "\n".join(pages))
    return summaries


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=[*PARTS, "compiled", "tables"])
    parser.add_argument("--only", default="", help="the cells that hold this text; the others stay as they are kept")
    parser.add_argument("--quick", action="store_true", help="a smoke test of tiny sizes, written to out/quick")
    parser.add_argument("--out", type=Path, help="a folder for results, page and pictures instead of the kept ones")
    args = parser.parse_args(arguments)
    if args.part == "compiled":
        raise SystemExit(subprocess.call([sys.executable, "-m", "benchmarks.compiled", args.only], cwd=results.ROOT))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with PyTorch
    out = args.out or (results.ROOT / "out" / "quick" if args.quick else None)
    for part in [] if args.part == "tables" else [args.part] if args.part else PARTS:
        measure(part, args.quick, args.only, out or results.KEPT)
    summaries = publish(out or results.KEPT, out or results.ROOT / "docs")
    for name, text in summaries.items() if out is None else ():
        report.include(results.ROOT / "README.md", name, text)


if __name__ == "__main__":
    main()
