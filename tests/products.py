"""Which cells of a product of parameters run: pairs rather than all, and of these a diagonal in the quick run.

Stacked `parametrize` and parametrized fixtures multiply. Kept are cells in which every two of them meet in each way
that the product lets them meet (of two that is all of it); `--full-products` keeps the rest too. The cells of a
diagonal, in which every value of every name comes once, are quick; the others have the mark `thorough`. With the mark
`diagonal` that is all of a test's cells, with the mark `whole` every cell is quick. Cells with the mark `full` are for
`--full-products` alone.
"""

from collections import defaultdict
from collections.abc import Hashable
from itertools import combinations

import pytest

APART = ("device",)  # a machine's backends have each a product of their own
Cell = frozenset[tuple[str, Hashable]]


def covering(cells: list[Cell], wanted: int) -> set[int]:
    """Indices of cells that together have every set of `wanted` values that a cell has; the earlier ones first."""
    sets = [{frozenset(some) for some in combinations(sorted(cell), min(wanted, len(cell)))} for cell in cells]
    missing, chosen = set().union(*sets), set()
    while missing:
        best = max(range(len(cells)), key=lambda i: (len(sets[i] & missing), -i))
        missing -= sets[best]
        chosen.add(best)
    return chosen


def select(config, items: list[pytest.Item]) -> None:
    """Marks and deselects, in place."""
    everything = config.getoption("--full-products")
    groups, dropped = defaultdict(list), set()
    for item in items:
        if item.get_closest_marker("full") and not everything:
            dropped.add(item)
            continue
        spec = getattr(item, "callspec", None)
        if spec is not None and not item.get_closest_marker("whole"):
            groups[item.nodeid.split("[")[0], *(spec.params.get(name) for name in APART)].append(item)
    for group in groups.values():
        named = [item.callspec.params.items() for item in group]
        values = [frozenset((name, repr(v)) for name, v in some if name not in APART) for some in named]
        may = [i for i, item in enumerate(group) if not item.get_closest_marker("thorough")]
        quick = {may[i] for i in covering([values[i] for i in may], 1)}
        wanted = 1 if group[0].get_closest_marker("diagonal") else 2
        kept = range(len(group)) if everything else quick | covering(values, wanted)
        for i, item in enumerate(group):
            if i not in kept:
                dropped.add(item)
            elif i not in quick:
                item.add_marker("thorough")
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]
