"""The doors with Optax's names: how they are called, and what differs on purpose. `test_peers.py` has their values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_within, epsilon

import softmax_jax

SHAPE = (3, 4, 5)


def operands(rng):
    """Logits, and labels that do not sum to 1."""
    return jnp.asarray(3 * rng.normal(size=SHAPE), jnp.float32), jnp.asarray(rng.gamma(1.0, size=SHAPE), jnp.float32)


def test_labels_broadcast_in_safe_and_poly_only(rng):
    logits, labels = operands(rng)
    for door in (softmax_jax.safe_softmax_cross_entropy, softmax_jax.poly_loss_cross_entropy):
        np.testing.assert_array_equal(door(logits, labels[0, 0]), door(logits, jnp.broadcast_to(labels[0, 0], SHAPE)))
    with pytest.raises(ValueError, match=r"labels.shape=\(5,\)"):
        softmax_jax.softmax_cross_entropy(logits, labels[0, 0])


def test_a_row_mask_of_lower_rank_broadcasts_over_the_batch(rng):
    logits, labels = operands(rng)
    where = jnp.array([True, False, True, True])
    got = softmax_jax.softmax_cross_entropy(logits, labels, where=where)
    want = softmax_jax.softmax_cross_entropy(logits, labels) * where.astype(jnp.float32)[None, :]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("margin", [0.0, 30.0])
def test_derivatives_in_both_modes(rng, margin):
    """As of Optax's; at a margin too at which its own are 0. An error is of the terms Σ_v |∂/∂z_v · dz_v|."""
    ids, direction = rng.integers(5, size=SHAPE[:-1]), np.float32(rng.normal(size=SHAPE))
    dense = np.eye(5, dtype=np.float32)[ids]
    logits = np.float32(rng.normal(size=SHAPE)) + np.float32(margin) * dense
    kinds = dict.fromkeys(["softmax_cross_entropy", "safe_softmax_cross_entropy", "poly_loss_cross_entropy"], dense)
    for name, labels in {"softmax_cross_entropy_with_integer_labels": ids, **kinds}.items():
        loss = lambda z, name=name, labels=labels: getattr(softmax_jax, name)(z, labels)  # noqa: E731
        tangent, gradient, forward = jax.jit(
            lambda z, dz, loss=loss: (
                jax.jvp(loss, (z,), (dz,))[1],
                jax.grad(lambda z: loss(z).sum())(z),
                jax.jacfwd(lambda z: loss(z).sum())(z),
            )
        )(logits, direction)
        p = np.exp(np.float64(logits) - np.float64(logits).max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        miss = (p * (1 - dense)).sum(-1, keepdims=True)
        want = np.where(dense == 1, -miss, p)
        if name.startswith("poly"):  # and ε (1 - p) of the label's p
            want = want * (1 + 2 * np.sum(p * dense, -1, keepdims=True))
        assert_within(gradient, want, np.abs(want) * (1 + margin), 16)
        assert_within(forward, want, np.abs(want) * (1 + margin), 16)
        assert_within(tangent, (want * direction).sum(-1), (np.abs(want * direction)).sum(-1) * (1 + margin), 16)


@pytest.mark.optimized
def test_exact_in_the_tail():
    """Odds e^-margin: -log p = log1p(odds), 1 - p = odds/(1 + odds), gradient -p' of both, in every door."""
    margins = np.array([0, 10, 20, 40, 60])
    logits, one_hot = np.stack([margins, 0 * margins], 1).astype(np.float32), jnp.array([[1.0, 0.0]] * 5)
    odds = np.exp(-np.float64(margins))
    miss = odds / (1 + odds)
    cases = [
        (softmax_jax.softmax_cross_entropy, one_hot, np.log1p(odds), -miss),
        (softmax_jax.safe_softmax_cross_entropy, one_hot, np.log1p(odds), -miss),
        (softmax_jax.softmax_cross_entropy_with_integer_labels, jnp.zeros(5, int), np.log1p(odds), -miss),
        (softmax_jax.poly_loss_cross_entropy, one_hot, np.log1p(odds) + 2 * miss, -miss - 2 * miss * (1 - miss)),
    ]
    for door, labels, loss, gradient in cases:
        values, pull = jax.vjp(jax.jit(lambda z, door=door, labels=labels: door(z, labels)), logits)
        np.testing.assert_allclose(values, loss, rtol=1e-5)
        np.testing.assert_allclose(pull(jnp.ones(5))[0][:, 0], gradient, rtol=1e-5)


@pytest.mark.nan
def test_what_differs_on_purpose():
    """Out of range is NaN, hidden is inf, 0 · -inf is 0, 16-bit logits give a float32 loss."""
    logits, integer = jnp.array([[1.0, 2.0, -jnp.inf]]), softmax_jax.softmax_cross_entropy_with_integer_labels
    assert all(np.isnan(integer(logits, jnp.array([label]))) for label in (-1, 3))
    assert integer(logits, jnp.array([0]), where=jnp.array([[False, True, True]])) == jnp.inf
    dense = softmax_jax.softmax_cross_entropy(logits, jnp.array([[0.0, 1.0, 0.0]]))
    np.testing.assert_allclose(dense, np.log1p(np.exp(-1.0)), rtol=4 * epsilon(jnp.float32))
    assert integer(logits.astype(jnp.bfloat16), jnp.array([1])).dtype == jnp.float32
    hidden = jax.jit(jax.grad(lambda t: softmax_jax.poly_loss_cross_entropy(logits, t, where=logits > 1)[0]))
    np.testing.assert_array_equal(hidden(jnp.ones((1, 3)))[0, ::2], 0)


@pytest.mark.usefixtures("untyped")
def test_bad_input_is_refused_with_the_way_out():
    logits = jnp.ones((2, 3))
    integer = softmax_jax.softmax_cross_entropy_with_integer_labels
    with pytest.raises(TypeError, match="must be integers; got dtype float32.*softmax_cross_entropy"):
        integer(logits, jnp.ones(2, jnp.float32))
    with pytest.raises(TypeError, match="int or a tuple of ints; got None"):
        integer(logits, jnp.zeros(2, jnp.int32), axis=None)
    with pytest.raises(ValueError, match="names an axis twice"):
        softmax_jax.softmax_cross_entropy(logits, logits, axis=(0, 0))
    with pytest.raises(ValueError, match=r"axis=2 for logits.shape=\(2, 3\)"):
        softmax_jax.softmax_cross_entropy(logits, logits, axis=2)
    with pytest.raises(ValueError, match=r"there are no classes: logits.shape=\(2, 0\)"):
        softmax_jax.softmax_cross_entropy(logits[:, :0], logits[:, :0])
    with pytest.raises(ValueError, match="there are no classes"):
        integer(logits[:0], jnp.zeros(3, jnp.int32), axis=0)


def test_integer_one_hot_labels_are_floating_ones(rng):
    """Optax multiplies by them; here they are not taken for ids."""
    logits, one_hot = operands(rng)[0], np.eye(5, dtype=np.int32)[rng.integers(0, 5, SHAPE[:-1])]
    got = softmax_jax.softmax_cross_entropy(logits, one_hot)
    np.testing.assert_array_equal(got, softmax_jax.softmax_cross_entropy(logits, one_hot.astype(np.float32)))


def test_an_empty_batch_with_several_class_axes():
    empty = jnp.zeros((0, 3, 4))
    for door in (softmax_jax.softmax_cross_entropy, softmax_jax.poly_loss_cross_entropy):
        assert door(empty, empty, axis=(1, 2)).shape == (0,)
    ids = jnp.zeros(0, jnp.int32)
    assert softmax_jax.softmax_cross_entropy_with_integer_labels(empty, ids, axis=(1, 2)).shape == (0,)
