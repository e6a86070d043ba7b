"""Every row of docs/failures.md has tests, and they are here."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
ROWS = re.findall(r"^\| (\d+) \|(.*)\|(.*)\|(.*)\|$", (TESTS.parent / "docs/failures.md").read_text(), re.MULTILINE)


def test_every_failure_known_elsewhere_has_a_test():
    assert [int(row[0]) for row in ROWS] == list(range(1, 27))
    trees = [ast.parse(path.read_text()) for path in TESTS.glob("test_*.py")]
    here = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    for number, _, _, tests in ROWS:
        named = re.findall(r"`(test_\w+)`", tests)
        assert named, f"failure {number} has no test"
        assert set(named) <= here, f"failure {number}: {set(named) - here} is gone"
