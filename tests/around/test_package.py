"""What a package has around its code: one version, one list of names, files that an archive needs."""

import ast
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import softmax_jax

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_that_of_the_installed_package():
    assert softmax_jax.__version__ == version("softmax_jax")


def test_one_version_in_every_file():
    number = softmax_jax.__version__
    (cited,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest, *_ = re.findall(r"^## \[(\d.+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert number == cited == newest


def test_all_is_every_public_name():
    """And nothing that is imported along with them."""
    found = {name for name, value in vars(softmax_jax).items() if not name.startswith("_") and callable(value)}
    assert sorted(softmax_jax.__all__) == sorted(found)
    assert len(set(softmax_jax.__all__)) == len(softmax_jax.__all__)


def test_readme_names_every_public_name():
    named = set(re.findall(r"`(\w+)\b", (ROOT / "README.md").read_text()))
    assert not set(softmax_jax.__all__) - named


def test_what_readme_and_changelog_link_to_is_in_the_source_archive():
    patterns = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert all(pattern.startswith("/") for pattern in patterns)  # else they hold at any depth
    kept = [pattern[1:] for pattern in patterns]
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text()):
            if "://" not in target:
                assert (ROOT / target).exists(), f"{page} links to {target}"
                assert Path(target).parts[0] in kept, f"{page} links to {target}, which no archive has"


def test_classifiers_are_the_versions_that_contributing_names():
    (row,) = re.findall(r"^\| Python \| (.+?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    named = [entry.rsplit(" ", 1)[1] for entry in PROJECT["project"]["classifiers"] if "Python :: 3." in entry]
    assert named == re.findall(r"3\.\d+", row)
    (oldest,) = re.findall(r"\d+\.\d+", PROJECT["project"]["requires-python"])
    assert oldest == named[0]


# The house: imports run one way, downwards, and a room's door holds no second name for what is inside.

PACKAGE = ROOT / "softmax_jax"
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
ORDER = ["_devices", "_transforms", "_inputs", "_sums", "_divergence", "_head", "_core"]  # then the functions


def imported(path):
    """The modules of this package that a file imports."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "") in FILES}


def floor(module):
    """One above the highest that it imports; of a cycle there is no end."""
    return 1 + max(map(floor, imported(FILES[module])), default=0)


def room(module):
    name = module.split(".")[1]
    return ORDER.index(name) if name in ORDER else len(ORDER)


def test_imports_run_downwards_on_few_floors():
    floors = {module: floor(module) for module in FILES if not module.endswith("__init__")}
    assert max(floors.values()) <= 8, {module: at for module, at in floors.items() if at > 8}  # `__init__` is the ninth


def test_rooms_import_those_before_them():
    for module, path in FILES.items():
        if not module.endswith("__init__"):
            for other in imported(path):
                assert room(other) <= room(module), f"{module} imports {other}"


def test_rooms_hold_a_docstring_alone():
    rooms = [path for module, path in FILES.items() if module.endswith(".__init__") and path.parent != PACKAGE]
    assert len(rooms) == 4
    for path in rooms:
        (docstring,) = ast.parse(path.read_text()).body
        assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)
        named = set(re.findall(r"^ {4}(\w+)  ", docstring.value.value, re.MULTILINE))
        assert {other.stem for other in path.parent.glob("*.py")} - {"__init__"} <= named
