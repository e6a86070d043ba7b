"""JAX's global settings change nothing: x64, strict promotion, NaN checks, switched off compilation, precision.

docs/tested.md says under which of them the whole suite runs; here is what only a comparison shows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import FLOATS, epsilon, few_of

import softmax_jax
from softmax_jax import cross_entropy, linear_cross_entropy

OPTIONS = {name: float(value) for name, value in FLOATS.items()}


def results(dtype, reduction, every):
    """The types of the value and gradients of every door, or of three, for operands of at most 32 bits and Python's own
    numbers."""
    z, t, ids = np.ones((4, 7), dtype), np.ones((4, 7), np.float32), np.zeros(4, np.int32)
    x, weight, bias = np.ones((4, 3), dtype), np.ones((3, 7), dtype), np.ones(7, np.float32)
    c, w, where = np.ones(7, np.float32), np.ones(4, np.float32), np.ones((4, 7), bool)
    arrays = {"class_weights": c, "weights": w, "where": where, **OPTIONS}
    cases = {
        "softmax": (softmax_jax.softmax, z),
        "log_softmax": (softmax_jax.log_softmax, z),
        "optax": (lambda z: softmax_jax.softmax_cross_entropy(z, t), z),
        "optax, integer": (lambda z: softmax_jax.softmax_cross_entropy_with_integer_labels(z, ids), z),
        "poly": (lambda z, t: softmax_jax.poly_loss_cross_entropy(z, t, epsilon=2.0), z, t),
        "safe": (softmax_jax.safe_softmax_cross_entropy, z, t),
    }
    how = {"reduction": reduction, **({"normalizer": 3} if reduction == "mean" else {})}
    cases["plain"] = lambda z: cross_entropy(z, ids, **how), z
    cases["dense"] = lambda z, t: cross_entropy(z, t, **how, **arrays), z, t
    head = lambda x, v, b: linear_cross_entropy(x, v, ids, bias=b, chunk_size=3, **how, **arrays)  # noqa: E731
    cases["linear"] = head, x, weight, bias

    def both(f, *operands):
        y, pull = jax.vjp(f, *operands)
        return y, pull(jnp.ones_like(y))

    chosen = cases.keys() if every else ("plain", "dense", "linear")
    of = lambda f, *operands: jax.eval_shape(lambda *a: both(f, *a), *operands)  # noqa: E731
    return {name: of(*cases[name]) for name in chosen}


@pytest.mark.diagonal
@pytest.mark.parametrize(
    "dtype", few_of([jnp.bfloat16, np.float32, np.float16], thorough=1), ids=lambda d: np.dtype(d).name
)
@pytest.mark.parametrize("reduction", few_of(["mean", "none", "sum"], thorough=1))
@pytest.mark.parametrize("every", few_of([False, True]), ids=["three doors", "every door"])
@pytest.mark.compiled
def test_no_type_changes_with_x64(dtype, reduction, every):
    with jax.enable_x64(False):
        without = results(dtype, reduction, every)
    with jax.enable_x64(True):
        assert results(dtype, reduction, every) == without
        assert all(f(np.ones(3, np.int32)).dtype == np.float32 for f in (softmax_jax.softmax, softmax_jax.log_softmax))
    assert without["dense"][0].dtype == np.float32
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(without))


def test_operands_of_different_widths_under_strict_promotion(rng):
    """A float64 bias to bfloat16 states: each gradient in its own operand's type, and as exact as their product."""
    with jax.enable_x64(True):
        operands = (
            jnp.asarray(rng.normal(size=(5, 3)), jnp.bfloat16),
            jnp.asarray(rng.normal(size=(3, 7)), jnp.float32),
            jnp.asarray(rng.normal(size=7), jnp.float64),
        )
        labels, (x, weight, bias) = np.arange(5), (np.float64(a) for a in operands)
        for reduction in ("mean", "none"):
            f = lambda x, w, b, how=reduction: linear_cross_entropy(  # noqa: E731
                x, w, labels, bias=b, chunk_size=2, reduction=how
            )
            loss, pull = jax.vjp(jax.jit(f), *operands)
            cotangent = jnp.asarray(rng.normal(size=loss.shape), loss.dtype)
            gradients = pull(cotangent)
            assert [g.dtype for g in gradients] == [a.dtype for a in operands]
            logits, how = x @ weight + bias, {"reduction": reduction, "cotangent": np.float64(cotangent)}
            d = reference.cross_entropy(logits, labels, **how).grad
            for got, want in zip(gradients, (d @ weight.T, x.T @ d, d.sum(0)), strict=True):
                # In float32, the condition of a sum of 7 terms or 5; dx is rounded to bfloat16 once more.
                tolerance = 64 * epsilon(jnp.float32) + (epsilon(got.dtype) if got.dtype == jnp.bfloat16 else 0)
                size = np.abs(x).max() * np.abs(weight).max() + np.abs(d).max()
                np.testing.assert_allclose(np.float64(got), want, rtol=0, atol=tolerance * (1 + size))


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_the_head_is_multiplied_in_the_precision_that_is_set(precision):
    """`jax.default_matmul_precision` reaches all three products; the library sets none of its own."""
    operands = jnp.ones((4, 3), jnp.float32), jnp.ones((3, 7), jnp.float32)
    f = jax.grad(lambda x, w: linear_cross_entropy(x, w, jnp.zeros(4, jnp.int32)), (0, 1))
    with jax.default_matmul_precision(precision):
        text = jax.jit(f).lower(*operands).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert all(f"precision = [{precision.upper()}, {precision.upper()}]" in line for line in products)
