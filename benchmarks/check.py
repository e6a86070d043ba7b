"""What fell by more than 15 % since the kept results: `python -m benchmarks.check fresh.json [kept.json]`.

Compared are the medians of our times over the peers', and the memory of a step over Optax's. The exit code is 1 if
anything fell.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.results import KEPT, Key, Results, key, load

TOLERANCE = 1.15

Ratios = dict[tuple[Key, str], float]


def ratios_of(results: Results) -> Ratios:
    found = {}
    for part, run in results["parts"].items():
        for record in run["records"]:
            times = {f"time / {name}": numbers[1] for name, numbers in record.get("ratios", {}).items()}
            memory = {f"memory / {name}": number for name, number in record.get("memory", {}).items()}
            found |= {(key(part, record), name): ratio for name, ratio in {**times, **memory}.items()}
    return found


def fallen(fresh: Results, kept: Results) -> list[str]:
    """A line for every ratio that both have and that has grown by more than the tolerance, the worst first."""
    now, then = ratios_of(fresh), ratios_of(kept)
    grown = {name: now[name] / then[name] for name in now if name in then}
    return [
        f"{', '.join(name[0])}: {name[1]} {then[name]:.2f} -> {now[name]:.2f}"
        for name in sorted(grown, key=grown.__getitem__, reverse=True)
        if grown[name] > TOLERANCE
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fresh", type=Path)
    parser.add_argument("kept", type=Path, nargs="?", help="default: the file of the same name in benchmarks/results")
    args = parser.parse_args(arguments)
    fresh, kept = load(args.fresh), load(args.kept or KEPT / args.fresh.name)
    both = ratios_of(fresh).keys() & ratios_of(kept).keys()
    lines = fallen(fresh, kept)
    print(*lines, f"{len(lines)} of {len(both)} ratios fell by more than {TOLERANCE - 1:.0%}", sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
