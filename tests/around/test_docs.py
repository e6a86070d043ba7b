"""README and the pages of docs: their code runs as it stands there, and what they name is there."""

import contextlib
import io
import os
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from helpers import relative_error

ROOT = Path(__file__).parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]}
QUICK = {"README.md", "docs/index.md"}
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]\d+)?")
SHELL = {"sh", "bash", "console"}


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of a page's fenced blocks."""
    return [(language, re.sub(rf"^{indent}", "", text, flags=re.M)) for indent, language, text in FENCE.findall(page)]


@cache
def names_of(name: str) -> dict[str, Any]:
    """What a page defines. Its blocks run in order, as one program, under JAX's own settings, as readers have them; the
    `text` right after a block is what it prints."""
    found, printed = {"__name__": name}, ""
    settings = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with settings[0], settings[1], mock.patch.dict(os.environ):
        for language, text in blocks(PAGES[name].read_text()):
            if language == "text" and printed:
                assert as_expected(printed, text), f"{name} prints\n{printed}"
            printed = ""
            if language == "python":
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile(text, name, "exec"), found)
                printed = out.getvalue()
    return found


def as_expected(printed: str, told: str) -> bool:
    """The same words, and numbers to 5 %."""
    (words, numbers), (of_page, told_numbers) = (
        (NUMBER.sub("#", text), [float(number) for number in NUMBER.findall(text)]) for text in (printed, told)
    )
    return words == of_page and np.allclose(numbers, told_numbers, rtol=0.05, atol=0)


def has_code(name: str) -> bool:
    return any(language == "python" for language, _ in blocks(PAGES[name].read_text()))


def marks_of(name: str) -> list[Any]:
    of_devices = [pytest.mark.devices] if "host_platform_device_count" in PAGES[name].read_text() else []
    return of_devices if name in QUICK else [pytest.mark.thorough, *of_devices]


@pytest.mark.compiled
@pytest.mark.nan
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=marks_of(name)) for name in PAGES if has_code(name)],
)
def test_code_of_a_page_runs_as_it_stands(name):
    names_of(name)


def test_every_block_has_a_language_that_is_checked():
    for name, path in PAGES.items():
        for language, text in blocks(path.read_text()):
            assert language in {"python", "text", "mermaid", *SHELL}, (
                f"{name}: {language or 'no language'}: {text[:80]}"
            )


def test_commands_name_what_is_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, path in PAGES.items():
        for text in [text for language, text in blocks(path.read_text()) if language in SHELL]:
            for file in re.findall(r"(?<![\w/.:])(?:tests|examples|docs|benchmarks|\.ci)/[\w./-]+", text):
                assert (ROOT / file).exists(), f"{name}: {file} is not there"
            for wanted in re.findall(r"(?:\.|softmax_jax)\[([\w,]+)\]", text):
                assert set(wanted.split(",")) <= set(extras), f"{name}: no extra {wanted}"
            for module in re.findall(r"python3? -m (benchmarks[\w.]*)", text):
                assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists() or (ROOT / module).is_dir()


def test_links_and_pictures_are_there():
    for name, path in PAGES.items():
        text = FENCE.sub("", path.read_text())
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text):
            if not re.match(r"[a-z]+:", target):
                assert (path.parent / target).exists(), f"{name}: {target} is not there"


def test_gallery_shows_every_example():
    page = (ROOT / "docs/gallery.md").read_text()
    for name in [path.stem for path in ROOT.glob("examples/*.py")]:
        assert f"python examples/{name}.py" in page and f"](pictures/{name}.png)" in page, name


def log_softmax(z, temperature=1.0):
    z = np.float64(z) / temperature
    return z - np.logaddexp.reduce(z, -1, keepdims=True)


def divergences(student, teacher, temperature):
    log_t, log_p = log_softmax(teacher, temperature), log_softmax(student, temperature)
    return np.sum(np.exp(log_t) * (log_t - log_p), -1)


@pytest.mark.thorough
def test_distillation(rng):
    """The functions of the page, against float64."""
    page = names_of("docs/guides/distillation.md")
    x, head, teacher_x, teacher_head = (
        np.float32(rng.integers(-8, 9, shape) / 8) for shape in ((6, 4), (4, 11), (6, 3), (3, 11))
    )  # products of eighths are exact
    student, teacher, weights = x @ head, teacher_x @ teacher_head, np.float32(rng.uniform(0.5, 2, 6))
    mean = lambda rows: np.sum(weights * rows) / np.sum(np.float64(weights))  # noqa: E731

    assert (
        relative_error(page["distill"](student, teacher, weights), 16 * mean(divergences(student, teacher, 4))) < 1e-5
    )
    got = page["distill_heads"](x, head, teacher_x, teacher_head, weights)
    assert relative_error(got, mean(divergences(student, teacher, 2))) < 1e-5

    t = np.exp(log_softmax(teacher))
    ids = np.argsort(-t, -1)[:, :3].astype(np.int32)
    probs = np.float32(np.take_along_axis(t, ids, -1))
    spread = np.repeat((1 - np.sum(np.float64(probs), -1, keepdims=True)) / 8, 11, -1)
    np.put_along_axis(spread, ids, np.float64(probs), -1)
    want = np.mean(-np.sum(spread * log_softmax(student), -1))
    assert relative_error(page["distill_stored"](student, ids, probs), want) < 1e-5
