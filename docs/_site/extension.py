"""What the site adds to Markdown: formulas, which are indented blocks, and doctests, which begin with `>>>`; all other
code is fenced. A hook of MkDocs, so that pages and docstrings have both."""

import html

from formulas import block
from markdown import Extension
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


class FormulaExtension(Extension):
    def extendMarkdown(self, md):
        md.treeprocessors.register(Formulas(md), "formulas", 31)  # pymdownx.highlight has 30
        md.preprocessors.register(Doctests(md), "doctests", 29)  # fences have 25


def on_config(config):
    config.markdown_extensions.append(FormulaExtension())
    return config
