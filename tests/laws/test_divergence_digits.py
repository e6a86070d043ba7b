"""The digits of a divergence: value and both gradients against 50 decimal digits, however close the two sides are."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import exp, inf, isfinite, isnan, log, mp, mpf, nan

from softmax_jax import kl_divergence
from softmax_jax._sums import blocks

pytestmark = [pytest.mark.optimized, pytest.mark.nan]

# The largest entry of a row passes through some 25 operations that do not cancel: differences of logits, exponentials,
# sums of positive terms, a quotient, a logarithm and the products of these. Each is off by at most 2^-23 of its result.
TOLERANCE = 3e-6  # 25 · 2^-23
NEGLIGIBLE = 1e-30  # terms below 1e-38 underflow in float32: a row that is smaller than this is compared absolutely

Digits = Any  # an mpf, of 50 decimal digits
Row = list[Digits]
Case = tuple[np.ndarray, np.ndarray]  # the logits of the teacher and of the student, [rows, classes]


def cases_of(rng: np.random.Generator) -> dict[str, Case]:
    normal = lambda scale, rows=2, classes=300: scale * rng.normal(size=(rows, classes))  # noqa: E731
    at = lambda top, value, classes=300: np.where(np.arange(classes) == top, value, 0.0)[None]  # noqa: E731
    is_top = lambda b: b == b.max(-1, keepdims=True)  # noqa: E731
    even, b, near = np.zeros((1, 2)), normal(3), normal(1e-3)
    huge = 1e8 + 8 * rng.integers(-4, 5, (2, 300))  # float32 holds the multiples of 8 there
    moved = huge + 8 * rng.integers(-1, 2, huge.shape)
    cases = {f"near {h:g}": (b, b + normal(h)) for h in (1, 1e-2, 1e-4, 1e-5, 1e-6)}
    cases |= {f"near {h:g}, offset {s}": (b, b + s + normal(h)) for h in (1e-2, 1e-4) for s in (100, -250)}
    cases |= {f"margin {z}": (at(3, z) + normal(0.1), at(3, z + 1) + normal(0.1)) for z in (10, 20, 40, 50)}
    cases |= {f"tops apart, margin {z}": (at(3, z) + normal(0.1), at(5, z) + normal(0.1)) for z in (10, 20, 50)}
    cases |= {f"one class off by {d:g}": (at(0, 0, 2000), at(0, d, 2000)) for d in (1e-3, -10, -100)}
    cases |= {f"teacher of e^{z:g}": (np.array([[0, z]]), even) for z in (-50, -200, -np.inf)}
    return cases | {
        "random tops": (normal(10), normal(10)),
        "top off by -100": (b, b + near + np.where(is_top(b), -100, 0)),
        "a hundred of e^-45": (at(0, 45, 101) - 45, at(0, 5, 101)),
        "student of -inf at the top": (b, np.where(is_top(b), -np.inf, b + near)),
        "absent, and rare at the top": (at(0, -5, 30), at(0, 5, 30) + at(1, -np.inf, 30)),
        "absent at a margin": (at(0, 0, 30), at(0, 90, 30)),
        "student of -inf elsewhere": (b, np.where(is_top(-b), -np.inf, b + near)),
        "-inf in both": (np.where(is_top(-b), -np.inf, b), np.where(is_top(-b), -np.inf, b + near)),
        "logits of 1e8": (huge, moved),
        "logits of 1e8, tops apart": (huge, rng.permuted(huge, axis=-1)),
    }


CASES = {name: tuple(map(np.float32, case)) for name, case in cases_of(np.random.default_rng(0)).items()}


def log_softmax(logits: np.ndarray, temperature: Digits) -> Row:
    z = [mpf(float(v)) / temperature for v in logits]
    log_normalizer = log(sum(map(exp, z)))
    return [v - log_normalizer for v in z]


def kl_and_slope(log_q: Row, log_m: Row) -> tuple[Digits, Row]:
    """(K = KL(q ‖ m), its gradient q (log(q/m) - K) by the logits of q while m stays)."""
    q = [exp(u) for u in log_q]
    terms = [x * (u - v) if x else mpf(0) for x, u, v in zip(q, log_q, log_m, strict=True)]  # 0 log 0 = 0
    kl = sum(terms)
    return kl, [term - x * kl if isfinite(kl) else nan for x, term in zip(q, terms, strict=True)]


def by_logits(slopes: Row, logits: np.ndarray, temperature: Digits) -> Row:
    """The gradient by raw logits. One of -inf is -inf at any temperature: its slope is not divided, as in `adjust`."""
    return [v if z == -np.inf else v / temperature for v, z in zip(slopes, logits, strict=True)]


def truth(b: np.ndarray, a: np.ndarray, beta: float, temperature: float) -> tuple[Row, Row, Row]:
    """(value, gradient by b, gradient by a) of one row, from the float32 numbers that the function is given.

    The slope of the side that weights an infinite divergence is NaN: it does not exist.
    """
    share, divisor = mpf(float(np.float32(beta))), mpf(float(np.float32(temperature)))
    log_t, log_p = log_softmax(b, divisor), log_softmax(a, divisor)
    t, p = [exp(v) for v in log_t], [exp(v) for v in log_p]
    if beta == 0:
        (value, db), da = kl_and_slope(log_t, log_p), [y - x for x, y in zip(t, p, strict=True)]
    elif beta == 1:
        (value, da), db = kl_and_slope(log_p, log_t), [x - y for x, y in zip(t, p, strict=True)]
    else:  # what the change of m adds to the gradients cancels between the two terms
        log_m = [log(share * x + (1 - share) * y) for x, y in zip(t, p, strict=True)]
        (of_t, db), (of_p, da) = kl_and_slope(log_t, log_m), kl_and_slope(log_p, log_m)
        value, db, da = share * of_t + (1 - share) * of_p, [share * v for v in db], [(1 - share) * v for v in da]
    return [value], by_logits(db, b, divisor), by_logits(da, a, divisor)


def relative_error(got: np.ndarray, want: Row) -> float:
    """The largest error of a row over its largest entry; 0 where the truth does not exist."""
    if any(map(isnan, want)):
        return 0.0
    if want == [inf]:
        return 0.0 if got == [np.inf] else np.inf
    error = float(np.max(np.abs([float(mpf(float(x)) - y) for x, y in zip(got, want, strict=True)])))
    size = max(abs(float(y)) for y in want)
    return error / size if size >= NEGLIGIBLE else TOLERANCE * error / NEGLIGIBLE


@partial(jax.jit, static_argnames=("beta", "temperature"))
def value_and_gradients(b: jax.Array, a: jax.Array, beta: float, temperature: float) -> tuple[jax.Array, ...]:
    options = {"beta": beta, "temperature": temperature, "reduction": "none"}
    value, pull = jax.vjp(lambda b, a: kl_divergence(a, teacher_logits=b, **options), b, a)
    return value[:, None], *pull(jnp.ones_like(value))


BOTH = [(t, beta) for t in (1.0, 0.7) for beta in (0.0, 0.3, 1.0)] + [(1.0, 0.01), (1.0, 0.99)]


@pytest.mark.whole
@pytest.mark.parametrize(("temperature", "beta"), BOTH)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_keep_their_digits(name: str, temperature: float, beta: float):
    b, a = CASES[name]
    got = map(np.asarray, value_and_gradients(b, a, beta, temperature))
    with mp.workdps(50):
        want = zip(*(truth(*row, beta, temperature) for row in zip(b, a, strict=True)), strict=True)
        errors = {
            part: [relative_error(*row) for row in zip(found, rows, strict=True)]
            for part, found, rows in zip(("value", "db", "da"), got, want, strict=True)
        }
    worst = float(np.max(list(errors.values())))  # NaN if one of them is
    # XLA on the CPU makes one pass class by class: half a unit in the last place of the sum for each.
    one_by_one = 0 if blocks.PLATFORMS else b.size // len(b) * 2**-24
    assert worst <= TOLERANCE + one_by_one, errors
