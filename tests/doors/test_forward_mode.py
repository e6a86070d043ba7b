"""`forward_mode=True`: the same values, and jvp, jacfwd, linearize and hessian that agree with the reverse rule."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ALONE, FLOATS, epsilon, few_of, random_case

from softmax_jax import cross_entropy

# Both go through the same sums; their derivatives are at most a few dozen products and sums of them.
BUDGET = 64 * epsilon(jnp.float32)


DIFFERENTIABLE = ("weights", "class_weights", *FLOATS)


def both_modes(rng, dense, what=""):
    """f(point, forward_mode), and a point of all operands that have a gradient; `what` the logits are or hold."""
    left_out = ["ignore_index"] * dense + ["softcap", "label_smoothing"] * (
        what == "-inf"
    )  # else a -softcap, or a loss of inf
    names = [name for name in ALONE if name not in left_out]
    shape, axis = ((7, 5), 0) if what == "other axis" else ((5, 7), -1)
    dtype = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}.get(what, jnp.float32)
    logits, labels, options = random_case(rng, shape, axis, dtype, dense, names)
    if what == "NaN row":
        options["weights"] = np.float32([1, 0, 2, 0.5, 1.5])
        logits[1] = np.nan
    elif what == "hidden NaN":
        logits[~options["where"]] = np.nan
    elif what == "-inf":
        options["where"][:, 3], logits[:, 2] = True, -np.inf
        labels = np.where(np.arange(7) == 2, 0, labels) if dense else np.where(labels == 2, 3, labels)
    floats = {name: jnp.asarray(options.pop(name)) for name in names if name in DIFFERENTIABLE}
    floats["logits"] = jnp.asarray(logits)
    if dense:
        floats["labels"] = jnp.asarray(labels)

    def f(point, forward_mode):
        rest = {"labels": jnp.asarray(labels)} | point
        return cross_entropy(rest.pop("logits"), rest.pop("labels"), forward_mode=forward_mode, **options, **rest)

    return f, floats


def assert_close(got, want, atol=BUDGET):
    numbers = lambda a: np.asarray(a, np.float64)  # noqa: E731
    scaled = lambda tree: jax.tree.map(lambda a, w: numbers(a) / (1 + np.max(np.abs(numbers(w)))), tree, want)  # noqa: E731
    chex.assert_trees_all_close(scaled(got), scaled(want), rtol=0, atol=atol)


@pytest.mark.thorough
@pytest.mark.parametrize("dense", few_of([True, False], thorough=0), ids=["dense", "integer"])
def test_first_and_second_derivatives_are_those_of_the_reverse_rule(rng, dense):
    f, point = both_modes(rng, dense)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), point)
    of_logits = lambda mode: lambda x: f(point | {"logits": x}, mode)  # noqa: E731

    @jax.jit
    def by_reverse_mode(point):
        return *jax.value_and_grad(f)(point, False), jax.hessian(of_logits(False))(point["logits"])

    @jax.jit
    def by_forward_mode(point, direction):
        forward = lambda p: f(p, True)  # noqa: E731
        along = jax.jvp(forward, (point,), (direction,)), jax.linearize(forward, point)[1](direction)
        x = point["logits"]
        return along, jax.grad(forward)(point), jax.jacfwd(of_logits(True))(x), jax.hessian(of_logits(True))(x)

    value, gradient, hessian = by_reverse_mode(point)
    along = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))
    want = ((value, along), along), gradient, gradient["logits"], hessian
    for got, want_it in zip(by_forward_mode(point, direction), want, strict=True):
        assert_close(got, want_it)


@pytest.mark.diagonal
@pytest.mark.nan
@pytest.mark.parametrize("dense", few_of([False, True]), ids=["integer", "dense"])
@pytest.mark.parametrize("what", few_of(["-inf", "bfloat16", "hidden NaN", "other axis", "float16"], thorough=3))
def test_derivatives_of_awkward_logits_are_those_of_the_reverse_rule(rng, what, dense):
    """Of the same numbers in float32: a gradient of 16-bit logits is rounded once more."""
    f, point = both_modes(rng, dense, what)
    direction = jax.tree.map(lambda a: np.asarray(rng.normal(size=a.shape), a.dtype), point)
    widened = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.float32), tree)  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(f), static_argnums=1)(widened(point), False)
    chex.assert_tree_all_finite((value, gradient))
    along = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, widened(direction))))

    @jax.jit
    def by_forward_mode(point, direction):
        forward = lambda p: f(p, True)  # noqa: E731
        return jax.jvp(forward, (point,), (direction,)), jax.grad(forward)(point)

    along_forward, gradient_forward = by_forward_mode(point, direction)
    assert_close(along_forward, (value, along))
    assert_close(widened(gradient_forward), gradient, BUDGET + epsilon(point["logits"].dtype) / 2)


@pytest.mark.parametrize("dense", few_of([False, True]), ids=["integer", "dense"])
def test_a_row_of_weight_zero_that_holds_nan_has_derivative_zero(rng, dense):
    f, point = both_modes(rng, dense, "NaN row")
    gradient, reverse = (jax.jit(jax.grad(f), static_argnums=1)(point, mode) for mode in (True, False))
    chex.assert_tree_all_finite(gradient)
    np.testing.assert_array_equal(gradient["logits"][1], 0)
    assert_close(gradient, reverse)


@pytest.mark.optimized
def test_exact_in_the_tail():
    logits = np.float32([[0, 0], [40, 0], [60, 0]])
    odds = np.exp(-np.array([0.0, 40, 60]))
    labels = jnp.zeros(3, jnp.int32)
    f = lambda z: cross_entropy(z, labels, reduction="none", forward_mode=True)  # noqa: E731
    direction = np.float32([[1, 0]] * 3)
    value, tangent = jax.jit(lambda z: jax.jvp(f, (z,), (direction,)))(logits)
    np.testing.assert_allclose(value, np.log1p(odds), rtol=1e-5)
    np.testing.assert_allclose(tangent, -odds / (1 + odds), rtol=1e-5)


@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
@pytest.mark.parametrize("names", [[], ALONE], ids=["alone", "all options"])
def test_keeps_no_array_of_logits_size_but_the_operands(rng, names, dense):
    """Logits, the mask, dense labels as they came, class weights twice; 8 numbers a token, and 8 more for options."""
    names = [name for name in names if not (dense and name == "ignore_index")]
    logits, labels, options = random_case(rng, (32, 512), -1, jnp.float32, dense, names)
    _, pull = jax.vjp(lambda x: cross_entropy(x, labels, forward_mode=True, **options), jnp.asarray(logits))
    kept = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(pull))
    operands = logits.nbytes + labels.nbytes * dense
    operands += options["where"].nbytes + 2 * options["class_weights"].nbytes if names else 0
    assert kept <= operands + 32 * 4 * 16  # numbers a token


def test_along_the_labels_alone(rng):
    """Σ_v dt_v (log_normalizer - z_v); the logits have no tangent."""
    logits, labels, _ = random_case(rng, (4, 9), -1, jnp.float32, True, [])
    direction = rng.normal(size=labels.shape).astype(np.float32)
    f = lambda t: cross_entropy(logits, t, reduction="none", forward_mode=True)  # noqa: E731
    tangent = jax.jit(lambda t, dt: jax.jvp(f, (t,), (dt,))[1])(labels, direction)
    terms = -direction * np.asarray(jax.nn.log_softmax(np.float64(logits)), np.float64)
    np.testing.assert_allclose(tangent, terms.sum(-1), atol=16 * 1.2e-7 * np.abs(terms).sum(-1).max(), rtol=0)


def test_without_it_forward_mode_is_refused(rng):
    logits, labels, _ = random_case(rng, (3, 5))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: cross_entropy(x, labels), (jnp.asarray(logits),), (jnp.asarray(logits),))


def test_an_infinite_dense_loss_has_the_gradient_of_the_reverse_rule():
    z = np.float32([[0, -np.inf, 0], [0, 0, 0]])
    loss = lambda z, mode: cross_entropy(z, jnp.full((2, 3), 1 / 3), reduction="none", forward_mode=mode)[0]  # noqa: E731
    np.testing.assert_allclose(*jax.jit(lambda z: [jax.grad(loss)(z, mode) for mode in (True, False)])(z), rtol=1e-6)
