"""The layers of the textbooks, the mistakes found in them, and the laws of the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import assert_within, epsilon, few_of, loss_and_grad, random_case

from softmax_jax import cross_entropy, softmax

EPS = epsilon(jnp.float32)


@pytest.fixture
def layer(rng):
    """Random integers 0-9 of shape (3, 5), as textbooks have it, and one-hot targets."""
    x = rng.integers(0, 10, (3, 5)).astype(np.float32)
    return x, np.eye(5, dtype=np.float32)[rng.integers(0, 5, 3)]


def test_batch_softmax_row_by_row(layer):
    """One maximum or one sum over the whole batch is the mistake: every row is a distribution of its own."""
    x, _ = layer
    x[1] += 200  # one maximum for all: the other rows would vanish
    y = np.asarray(softmax(x))
    rows = np.stack([np.exp(np.float64(row) - row.max()) / np.exp(np.float64(row) - row.max()).sum() for row in x])
    assert_within(y, rows, rows * 20, 4)
    np.testing.assert_allclose(y.sum(-1), 1, rtol=5 * EPS)
    for row, alone in zip(y, x, strict=True):
        np.testing.assert_allclose(row, softmax(alone), rtol=4 * EPS)


def test_no_overflow_at_1000(layer):
    """Without the maximum taken out, exp(1000) is inf and the result NaN."""
    x, t = layer
    np.testing.assert_array_equal(softmax(x + 1000), softmax(x))
    want = reference.cross_entropy(x + np.float32(1000), t, cotangent=0.7)
    loss, grad = loss_and_grad(jax.jit, x + np.float32(1000), t, np.float32(0.7), {})
    assert_within(loss, want.loss, 10, 8)
    assert_within(grad, want.grad, abs(want.grad) * 20 + 1, 8)


def test_softmax_then_summed_cross_entropy_error(layer):
    """E = -Σ t log y over the batch, from one layer instead of two."""
    x, t = layer
    want = -np.sum(t * np.log(reference.softmax(x)))
    assert_within(cross_entropy(x, t, reduction="sum"), want, want + 30, 8)


def test_the_combined_layer_backward_is_y_minus_t_over_batch(layer):
    x, t = layer
    y = reference.softmax(x)
    loss, grad = loss_and_grad(jax.jit, x, t, np.float32(1.9), {})
    assert_within(loss, -np.sum(t * np.log(y)) / 3, 30, 8)
    assert_within(grad, 1.9 * (y - t) / 3, 20 * 1.9 * np.ones_like(y) / 3, 8)


@pytest.mark.parametrize(("reduction", "divisor"), [("mean", 3), ("sum", 1)])
def test_loss_and_gradient_are_reduced_alike(layer, reduction, divisor):
    """A loss that is a sum with a gradient that is a mean: the directional difference of the loss shows it."""
    x, t = layer
    both = jax.jit(jax.value_and_grad(lambda x: cross_entropy(x, t, reduction=reduction)))
    with jax.enable_x64(True):
        x, t, v = np.float64(x), np.float64(t), np.random.default_rng(0).normal(size=x.shape)
        slope = (both(x + 1e-5 * v)[0] - both(x - 1e-5 * v)[0]) / 2e-5
        np.testing.assert_allclose(slope, np.vdot(both(x)[1], v), rtol=1e-8)
        np.testing.assert_allclose(both(x)[1], (reference.softmax(x) - t) / divisor, atol=1e-14)


def test_no_small_constant_inside_the_logarithm():
    """log(y + 1e-7) bends the loss: at most 16.1, and 1e-7 too small near 0."""
    z, label = np.array([[0, -40.0]], np.float32), np.array([1], np.int32)
    assert abs(float(cross_entropy(z, label)) - 40) <= 40 * EPS
    want = np.log1p(np.exp(-40.0))
    assert abs(float(cross_entropy(z, 1 - label)) - want) <= 50 * EPS * want


def test_softmax_backward_is_the_whole_jacobian(layer, rng):
    """y (1 - y) is its diagonal only; every off-diagonal entry is -y_u y_v."""
    x, _ = layer
    y = reference.softmax(x[0])
    np.testing.assert_allclose(jax.jacrev(softmax)(x[0]), np.diag(y) - np.outer(y, y), rtol=1e-5, atol=1e-7)
    g = rng.normal(size=5).astype(np.float32)
    got = jax.vjp(softmax, x[0])[1](jnp.asarray(g))[0]
    assert_within(got, y * (g - g @ y), y * 20 * abs(g).max(), 4)
    assert not np.allclose(got, g * y * (1 - y), rtol=1e-3)


names = pytest.mark.parametrize(
    "names", [[], ["class_weights", "label_smoothing", "weights"]], ids=["plain", "options"]
)
dense = pytest.mark.parametrize("dense", few_of([False, True]), ids=["integer", "dense"])


@names
@dense
def test_a_shift_of_every_logit_changes_nothing(rng, names, dense):
    """Bitwise, where logit + shift is exact: multiples of 1/8 and a shift of 1024. (A prior Σ c (z - m) too.)"""
    logits, labels, options = random_case(rng, (5, 41), dense=dense, names=names)
    logits = np.round(logits * 8) / 8
    for a, b in zip(
        loss_and_grad(jax.jit, logits, labels, np.float32(0.7), options),
        loss_and_grad(jax.jit, logits + np.float32(1024), labels, np.float32(0.7), options),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=4 * EPS, atol=1e-12)


@names
@dense
def test_gradient_rows_sum_to_zero(rng, names, dense):
    """As the loss does not change under a shift; to the rounding of its 41 entries."""
    logits, labels, options = random_case(rng, (5, 41), dense=dense, names=names)
    _, grad = loss_and_grad(jax.jit, logits, labels, np.float32(-1.7), options)
    grad = np.float64(grad)
    assert np.all(abs(grad.sum(-1)) <= 41 * EPS * abs(grad).sum(-1))


@names
@dense
def test_classes_in_another_order_give_the_same_loss(rng, names, dense):
    logits, labels, options = random_case(rng, (5, 41), dense=dense, names=names)
    order = rng.permutation(41)
    moved = {k: v[order] if k == "class_weights" else v for k, v in options.items()}
    moved_labels = labels[:, order] if dense else np.argsort(order)[labels].astype(np.int32)
    loss, grad = loss_and_grad(jax.jit, logits, labels, np.float32(0.7), options)
    other, moved_grad = loss_and_grad(jax.jit, logits[:, order], moved_labels, np.float32(0.7), moved)
    np.testing.assert_allclose(other, loss, rtol=8 * EPS)
    np.testing.assert_allclose(moved_grad, np.asarray(grad)[:, order], rtol=32 * EPS, atol=EPS * abs(grad).max())


@pytest.mark.parametrize("names", few_of([["class_weights", "label_smoothing", "weights"], []]), ids=len)
def test_one_hot_and_integer_labels_agree(rng, names):
    logits, labels, options = random_case(rng, (5, 41), names=names)
    options["reduction"] = "sum"  # the divisors of the means differ by the class weights
    integer = loss_and_grad(jax.jit, logits, labels, np.float32(0.7), options)
    one_hot = loss_and_grad(jax.jit, logits, np.eye(41, dtype=np.float32)[labels], np.float32(0.7), options)
    want = reference.cross_entropy(logits, labels, cotangent=0.7, **options)
    for a, b, condition in zip(integer, one_hot, want[2:], strict=True):
        assert_within(a, np.float64(b), condition, 8)
