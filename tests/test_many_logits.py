"""More than 2**31 logits, where 32-bit index arithmetic wraps: `pytest -m slow`, 13 GiB."""

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
