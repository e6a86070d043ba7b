"""What the site adds to Markdown: formulas, which are indented blocks, doctests, which begin with `>>>`, and links of
papers; all other code is fenced. A hook of MkDocs, so that pages and docstrings have both."""

import html
import xml.etree.ElementTree as etree

from formulas import block
from markdown import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor
from markdown.treeprocessors import Treeprocessor


class Formulas(Treeprocessor):
    """Indented blocks, before they are taken for code."""

    def run(self, root):
        for element in root.iter("pre"):
            if len(element) == 1 and element[0].tag == "code":
                text = html.unescape(element[0].text or "")
                element.clear()
                element.tag, element.text = "p", self.md.htmlStash.store(block(text))


class Doctests(Preprocessor):
    """Paragraphs that begin with `>>>`, which Markdown takes for quotations."""

    def run(self, lines):
        found, inside = [], False
        for line in lines:
            if not inside and line.startswith(">>> "):
                inside = True
                found.append("```pycon")
            elif inside and not line.strip():
                inside = False
                found.append("```")
            found.append(line)
        return [*found, "```"] if inside else found


class Indices(InlineProcessor):
    """z_v, Σ_{v≠y}, softmax(x)_v in a sentence."""

    PATTERN = r"(?<![\w.])([A-Za-zΣℓ]|d[a-z])_(\{[^}]+\}|[a-z])(?!\w)"
    AFTER_BRACKET = r"(\))_(\{[^}]+\}|[a-z])(?!\w)"

    def handleMatch(self, m, data):
        whole, below = etree.Element("span"), etree.Element("sub")
        whole.text, below.text = m[1], m[2].strip("{}")
        whole.append(below)
        return whole, m.start(0), m.end(0)


class Papers(InlineProcessor):
    """arXiv:1512.00567, as docstrings have it: a link."""

    PATTERN = r"arXiv:(\d{4}\.\d{4,5})"
    ANCESTOR_EXCLUDES = ("a",)

    def handleMatch(self, m, data):
        link = etree.Element("a", href=f"https://arxiv.org/abs/{m[1]}")
        link.text = m[0]
        return link, m.start(0), m.end(0)


class FormulaExtension(Extension):
    def extendMarkdown(self, md):
        md.treeprocessors.register(Formulas(md), "formulas", 31)  # pymdownx.highlight has 30
        md.inlinePatterns.register(Indices(Indices.PATTERN, md), "indices", 75)  # emphasis has 60, code 190
        md.inlinePatterns.register(Indices(Indices.AFTER_BRACKET, md), "indices after a bracket", 74)
        md.inlinePatterns.register(Papers(Papers.PATTERN, md), "papers", 73)
        md.preprocessors.register(Doctests(md), "doctests", 29)  # fences have 25


def on_config(config):
    config.markdown_extensions.append(FormulaExtension())
    return config
