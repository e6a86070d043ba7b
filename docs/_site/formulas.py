"""Formulas of docstrings and pages as MathML: an indented block of text, which is plain Unicode in the source.

    ℓ = Σ_v t_v · (log_normalizer - z_v)          three or more spaces begin another column

A browser sets MathML by itself: no script, and no network.
"""

import html
import re

WHOLE = {"z_loss", "teacher_x"}  # names that are no letter with an index
FUNCTIONS = {"log", "exp", "log1p", "expm1", "tanh", "max", "min", "clip", "KL", "cross_entropy", "kl_divergence"}
POWERS = {"²": "2", "³": "3", "ᵀ": "T"}
TOKEN = re.compile(
    r"""\s*(?:(?P<text>"[^"]*"|`[^`]*`)          # "none", `weight`
    |(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)
    |(?P<word>[A-Za-z][A-Za-z0-9_]+(?:-[a-z]\w+)*|[^\W\d_](?:_[a-z]\w*)?)   # log_normalizer, one-hot, z_v
    |(?P<sign>.))""",
    re.VERBOSE,
)


def block(text: str) -> str:
    """Groups of rows, between which a line is empty."""
    groups = re.split(r"\n\s*\n", text.strip("\n"))
    groups = ([re.split(r" {3,}", line.strip()) for line in group.splitlines()] for group in groups)
    return f'<div class="formula">{"".join(map(aligned, groups))}</div>'


def aligned(rows: list[list[str]]) -> str:
    """A table, if all rows have as many columns, more than one; else lines that may be broken between their parts."""
    columns = {len(row) for row in rows}
    if len(rows) > 1 and len(columns) == 1 and columns != {1}:
        cells = ("".join(f"<td>{parts(cell)}</td>" for cell in row) for row in rows)
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
    return "".join(f"<p>{'<span></span>'.join(map(parts, row))}</p>" for row in rows)


def parts(cell: str) -> str:
    """Two spaces, and a comma or semicolon outside of brackets, end a part."""
    found = re.split(r"  +(?=\S )|(?<=[,;]) (?![^(]*\))", cell)
    return " ".join(f'<math displaystyle="true">{Formula(part).all()}</math>' for part in found)


class Formula:
    """A cell's tokens, read from left to right."""

    def __init__(self, cell: str):
        matches = [match for match in TOKEN.finditer(cell) if match[0].strip()]
        self.tokens = [(kind, match[kind]) for match in matches if (kind := match.lastgroup)]
        self.at = 0

    def next_is(self, *signs: str) -> bool:
        return self.at < len(self.tokens) and self.tokens[self.at][1] in signs

    def take(self) -> tuple[str, str]:
        self.at += 1
        return self.tokens[self.at - 1]

    def all(self, until: str = "") -> str:
        parts, before = [], ""
        while self.at < len(self.tokens) and not self.next_is(until):
            kind, token = self.tokens[self.at]
            if token == "a" and self.at and self.tokens[self.at - 1][0] == "word":  # the article
                self.tokens[self.at] = kind, token = "text", token
            if kind in ("word", "text", "number") and (before in ("word", "text", "number") or before == ")"):
                parts.append('<mspace width="0.3em"/>')
            parts.append(self.term())
            before = kind if kind != "sign" else token
            if kind == "word" and token in FUNCTIONS and not self.next_is("("):
                parts.append('<mspace width="0.15em"/>')
        return f"<mrow>{''.join(parts)}</mrow>"

    def term(self) -> str:
        """A token with what is below and above it."""
        kind, token = self.take()
        base, below, above = self.base(kind, token), "", ""
        if kind == "word" and token not in WHOLE and (parts := re.fullmatch(r"(\w|[a-z]+)_(\w|(?<=^\w_)\w+)", token)):
            base, below = self.base(kind, parts[1]), self.base(kind, parts[2])
        if self.next_is("_"):
            self.take()
            below = self.group()
        if self.next_is("^"):
            self.take()
            above = self.group()
        elif self.next_is(*POWERS):
            above = f"<mn>{POWERS[self.take()[1]]}</mn>"
        if below and token[0] in "Σ":
            return f"<munder>{base}{below}</munder>"
        if below and above:
            return f"<msubsup>{base}{below}{above}</msubsup>"
        return f"<msub>{base}{below}</msub>" if below else f"<msup>{base}{above}</msup>" if above else base

    def group(self) -> str:
        for opening, closing in ("{}", "()"):
            if self.next_is(opening):
                self.take()
                inner = self.all(until=closing)
                self.take()
                return inner if opening == "{" else f"<mrow><mo>(</mo>{inner}<mo>)</mo></mrow>"
        return self.term()

    def base(self, kind: str, token: str) -> str:
        shown = html.escape(token.strip("`"))
        if kind == "number":
            return f"<mn>{shown}</mn>"
        if kind == "text" or (kind == "word" and len(token) > 1):
            return f"<mtext>{shown}</mtext>"
        if token == "Σ":
            return '<mo movablelimits="false">∑</mo>'
        if kind == "word":
            return f"<mi>{shown}</mi>"
        form = ""
        if token in "+·/=":
            form = ' form="infix"'  # also where a line begins with it
        elif token == "-" and (self.at == 1 or self.tokens[self.at - 2][1] in ("(", "[", "=", "·", "/", ",")):
            form = ' form="prefix"'
        elif token == ":":
            return '<mtext>:</mtext><mspace width="0.3em"/>'
        return f"<mo{form}>{'−' if token == '-' else shown}</mo>"
