"""docs/_site/formulas.py: what the site sets is what docstrings and pages say."""

import importlib.util
import inspect
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

import softmax_jax

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("formulas", ROOT / "docs/_site/formulas.py")
formulas = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(formulas)


def indented(text: str) -> list[str]:
    """Blocks of lines that begin with four spaces, between empty ones; before a docstring's list of arguments."""
    text = re.sub(r"^```.*?^```", "", text.split("\nArgs:")[0], flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"(?<=\n\n)((?: {4}.*\n|\n(?= {4}))+)", text + "\n")


def all_formulas() -> list[str]:
    docstrings = [inspect.getdoc(getattr(softmax_jax, name)) or "" for name in softmax_jax.__all__]
    pages = [path.read_text() for path in ROOT.glob("docs/**/*.md")]
    return [found for text in docstrings + pages for found in indented(text)]


def test_no_sign_is_lost():
    found = all_formulas()
    assert len(found) > 8
    for text in found:
        shown = "".join(ElementTree.fromstring(formulas.block(text)).itertext())
        shown, told = shown.replace("−", "-"), text.translate(str.maketrans({"Σ": "∑", **formulas.POWERS}))
        assert re.sub(r"[\s_]", "", shown) == re.sub(r"[\s_^{}`]", "", told)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("z_v", "<msub><mi>z</mi><mi>v</mi></msub>"),
        ("z_loss", "<mtext>z_loss</mtext>"),
        ("log_normalizer²", "<msup><mtext>log_normalizer</mtext><mn>2</mn></msup>"),
        ("p_ref", "<msub><mi>p</mi><mtext>ref</mtext></msub>"),
        ("Σ_{v≠y}", '<munder><mo movablelimits="false">∑</mo><mrow><mi>v</mi><mo>≠</mo><mi>y</mi></mrow></munder>'),
        ("-p", '<mo form="prefix">−</mo><mi>p</mi>'),
        ("(1-ε)", '<mo>(</mo><mn>1</mn><mo>−</mo><mi>ε</mi><mo>)</mo>'),
        ("one-hot", "<mtext>one-hot</mtext>"),
    ],
)  # fmt: skip
def test_terms(text, want):
    assert want in formulas.block(text)


def test_columns():
    """Of rows that have as many; others are lines, which a browser may break where they have a comma."""
    assert formulas.block("a = 1     b\nc = 2     d").count("<td>") == 4
    assert "<td>" not in formulas.block("a = 1, b     c\nd")
    assert formulas.block("a = 1, b     c\nd").count("<math") == 4
