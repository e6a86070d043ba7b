"""The code of docs/distillation.md, as it stands there, against float64."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import relative_error

PAGE = Path(__file__).parents[2] / "docs" / "distillation.md"


def log_softmax(z, temperature=1.0):
    z = np.float64(z) / temperature
    return z - np.logaddexp.reduce(z, -1, keepdims=True)


def divergences(student, teacher, temperature):
    log_t, log_p = log_softmax(teacher, temperature), log_softmax(student, temperature)
    return np.sum(np.exp(log_t) * (log_t - log_p), -1)


@pytest.mark.thorough
def test_distillation(rng):
    page = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, page)
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
