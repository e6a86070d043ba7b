"""What a package has around its code: one version, one list of names, files that an archive needs."""

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
    kept = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text()):
            if "://" not in target:
                assert (ROOT / target).exists(), f"{page} links to {target}"
                assert Path(target).parts[0] in kept, f"{page} links to {target}, which no archive has"
