"""`forward_mode=True`: the same values, and jvp, jacfwd, linearize and hessian that agree with the reverse rule."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ALONE, FLOATS, epsilon, random_case

from softmax_jax import cross_entropy

# Both go through the same sums; their derivatives are at most a few dozen products and sums of them.
BUDGET = 64 * epsilon(jnp.float32)


def both_modes(rng, dense, spoil=False):
    """f(point, forward_mode), and a point of all operands that have a gradient."""
    names = [name for name in ALONE if not (dense and name == "ignore_index")]
    logits, labels, options = random_case(rng, (5, 7), -1, jnp.float32, dense, names)
    if spoil:
        options["weights"] = np.float32([1, 0, 2, 0.5, 1.5])
        logits[1] = np.nan
    floats = {name: jnp.asarray(options.pop(name)) for name in ("weights", "class_weights", *FLOATS)}
    floats["logits"] = jnp.asarray(logits)
    if dense:
        floats["labels"] = jnp.asarray(labels)

    def f(point, forward_mode):
        rest = {"labels": jnp.asarray(labels)} | point
        return cross_entropy(rest.pop("logits"), rest.pop("labels"), forward_mode=forward_mode, **options, **rest)

    return f, floats


def assert_close(got, want):
    scaled = lambda tree: jax.tree.map(lambda a, w: a / (1 + jnp.max(jnp.abs(w))), tree, want)  # noqa: E731
    chex.assert_trees_all_close(scaled(got), scaled(want), rtol=0, atol=BUDGET)


@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
def test_first_and_second_derivatives_are_those_of_the_reverse_rule(rng, dense):
    f, point = both_modes(rng, dense)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), point)
    gradient = jax.grad(f)(point, False)
    along = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))
    forward = lambda p: f(p, True)  # noqa: E731

    value, tangent = jax.jvp(forward, (point,), (direction,))
    assert_close((value, tangent), (f(point, False), along))
    assert_close(jax.linearize(forward, point)[1](direction), along)
    assert_close(jax.grad(forward)(point), gradient)
    assert_close(jax.jacfwd(lambda x: f(point | {"logits": x}, True))(point["logits"]), gradient["logits"])
    of_logits = lambda mode: lambda x: f(point | {"logits": x}, mode)  # noqa: E731
    want = jax.hessian(of_logits(False))(point["logits"])
    assert_close(jax.hessian(of_logits(True))(point["logits"]), want)


@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
def test_a_row_of_weight_zero_that_holds_nan_has_derivative_zero(rng, dense):
    f, point = both_modes(rng, dense, spoil=True)
    gradient = jax.grad(f)(point, True)
    chex.assert_tree_all_finite(gradient)
    np.testing.assert_array_equal(gradient["logits"][1], 0)
    assert_close(gradient, jax.grad(f)(point, False))


def test_exact_in_the_tail():
    logits = jnp.array([[0.0, 0.0], [40.0, 0.0], [60.0, 0.0]])
    odds = np.exp(-np.array([0.0, 40, 60]))
    labels = jnp.zeros(3, jnp.int32)
    f = lambda z: cross_entropy(z, labels, reduction="none", forward_mode=True)  # noqa: E731
    value, tangent = jax.jvp(f, (logits,), (jnp.ones((3, 2)) * jnp.array([[1.0, 0.0]]),))
    np.testing.assert_allclose(value, np.log1p(odds), rtol=1e-5)
    np.testing.assert_allclose(tangent, -odds / (1 + odds), rtol=1e-5)


def test_keeps_no_array_of_logits_size_but_the_logits(rng):
    logits, labels, _ = random_case(rng, (32, 512))
    _, pull = jax.vjp(lambda x: cross_entropy(x, labels, forward_mode=True), jnp.asarray(logits))
    assert sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(pull)) <= logits.nbytes + 32 * 4 * 8


def test_without_it_forward_mode_is_refused(rng):
    logits, labels, _ = random_case(rng, (3, 5))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: cross_entropy(x, labels), (jnp.asarray(logits),), (jnp.asarray(logits),))
