"""More than 2**31 logits, where 32-bit indices wrap (`pytest -m slow`, 13 GiB), and more than 2**24 classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import assert_within

from softmax_jax import cross_entropy

ROWS, CLASSES = 65537, 32768  # the last row begins at entry 2**31


@pytest.mark.slow
@pytest.mark.parametrize("rows", [slice(-3, None), slice(0, 3)], ids=["beyond 2**31", "before"])
def test_beyond_two_to_the_31_logits(rng, rows):
    some = (3 * rng.normal(size=(3, CLASSES))).astype(jnp.bfloat16)
    labels, cotangents = rng.integers(0, CLASSES, ROWS).astype(np.int32), rng.normal(size=ROWS).astype(np.float32)

    @jax.jit
    def at(some, labels, cotangents):
        logits = jnp.zeros((ROWS, CLASSES), jnp.bfloat16).at[rows].set(some)
        losses, pull = jax.vjp(lambda z: cross_entropy(z, labels, reduction="none"), logits)
        return losses, pull(cotangents)[0][rows]

    losses, gradient = at(some, labels, cotangents)
    want = reference.cross_entropy(some, labels[rows], reduction="none", cotangent=np.float64(cotangents[rows]))
    assert_within(losses[rows], want.loss, want.loss_condition, 8)
    assert_within(gradient, want.grad, want.grad_condition, 8, jnp.bfloat16)
    others = np.delete(np.asarray(losses), np.arange(ROWS)[rows])
    np.testing.assert_allclose(others, np.log(CLASSES), rtol=1e-6)


@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
@pytest.mark.parametrize("classes", [2**24 + 4, 2**24 + 43], ids=["blocks", "prime"])
def test_more_classes_than_float32_has_integers(dense, classes):
    """Beyond 2²⁴ an id is no float32 any more: the label's neighbours must not be taken for it."""
    label = 2**24 + 1  # odd: in float32 it would be one of its neighbours
    logits = np.full((1, classes), -200, np.float32)  # all others are 0 beside these three
    logits[0, label - 1 : label + 2] = 0.5, 1.0, 0.25
    labels = np.array([label], np.int32)
    if dense:
        labels = np.zeros_like(logits)
        labels[0, label] = 1
    loss, gradient = jax.jit(jax.value_and_grad(cross_entropy))(logits, labels)
    odds = np.exp([-0.5, 0, -0.75])
    np.testing.assert_allclose(loss, np.log(odds.sum()), rtol=1e-6)
    np.testing.assert_allclose(gradient[0, label - 1 : label + 2], odds / odds.sum() - [0, 1, 0], rtol=1e-6)
