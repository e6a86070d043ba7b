"""Under vmap, scan, checkpoint, donation: the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import ALONE, assert_within, few_of, random_case

from softmax_jax import cross_entropy

IN_AXES = [(0, None), (None, 0), (0, 0), (2, 1), (1, None), (-1, 0)]


@pytest.mark.diagonal
@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
@pytest.mark.parametrize("in_axes", few_of(IN_AXES, 3), ids=str)
def test_vmap_over_batches(rng, in_axes, dense):
    reduction = "none" if in_axes[0] in (0, 2) else "mean"
    logits, labels, _ = random_case(rng, (3, 4, 7), dense=dense)
    cotangent = rng.normal(size=(3, 4) if reduction == "none" else (3,)).astype(np.float32)
    operands = []
    for operand, axis in zip((logits, labels), in_axes, strict=True):
        operands.append(operand[0] if axis is None else np.moveaxis(operand, 0, min(axis, operand.ndim - 1)))
    in_axes = tuple(a if a is None else min(a, x.ndim - 1) for a, x in zip(in_axes, operands, strict=True))

    def one(logits, labels, cotangent):
        loss, pull = jax.vjp(lambda x: cross_entropy(x, labels, reduction=reduction), logits)
        return loss, pull(cotangent)[0]

    got = jax.jit(jax.vmap(one, (*in_axes, 0)))(*operands, cotangent)
    for i in range(3):
        x, y = (v[0] if a is None else v[i] for v, a in zip((logits, labels), in_axes, strict=True))
        want = reference.cross_entropy(x, y, reduction=reduction, cotangent=np.float64(cotangent[i]))
        assert_within(got[0][i], want.loss, want.loss_condition, 8)
        assert_within(got[1][i], want.grad, want.grad_condition, 8)


@pytest.mark.parametrize("dense", few_of([False, True]), ids=["integer", "dense"])
def test_vmap_over_every_option_at_once(rng, dense):
    """Options of each batch's own: weights, masks, class weights, schedules."""
    names = [name for name in ALONE if name != "ignore_index"]
    cases = [random_case(rng, (4, 7), dense=dense, names=names) for _ in range(3)]
    logits, labels = (np.stack([case[i] for case in cases]) for i in range(2))
    rest = {
        k: np.stack([case[2][k] * (True if k == "where" else np.float32(s)) for s, case in enumerate(cases, 1)])
        for k in names
    }
    rest["label_smoothing"] = rest["label_smoothing"] / np.float32(5)
    grads = jax.jit(jax.vmap(jax.grad(lambda x, y, o: 1.7 * cross_entropy(x, y, **o))))(logits, labels, rest)
    for i in range(3):
        options = {k: v[i] for k, v in rest.items()}
        want = reference.cross_entropy(logits[i], labels[i], cotangent=1.7, **options)
        assert_within(grads[i], want.grad, want.grad_condition, 8)


def test_vmap_over_vmap_over_grad_gives_per_example_gradients(rng):
    logits, labels, _ = random_case(rng, (3, 4, 7))
    got = jax.vmap(jax.vmap(jax.grad(lambda z, y: 0.3 * cross_entropy(z, y))))(logits, labels)
    want = reference.cross_entropy(logits, labels, reduction="sum", cotangent=0.3)
    assert_within(got, want.grad, want.grad_condition, 8)


def test_scan_over_steps_trains_like_a_loop(rng):
    """Gradient descent on the logits themselves; a step multiplies errors by at most 1 (the loss is convex)."""
    logits, labels, options = random_case(rng, (5, 7), names=["weights", "label_smoothing"])

    def step(logits, smoothing):
        loss, grad = jax.value_and_grad(
            lambda x: cross_entropy(x, labels, label_smoothing=smoothing, weights=options["weights"])
        )(logits)
        return logits - 0.5 * grad, loss

    schedule = np.linspace(0, 0.3, 6, dtype=np.float32)
    last, losses = jax.jit(lambda x: jax.lax.scan(step, x, schedule))(logits)
    x = np.float64(logits)
    for smoothing, loss in zip(schedule, losses, strict=True):
        want = reference.cross_entropy(x, labels, label_smoothing=smoothing, weights=options["weights"])
        assert_within(loss, want.loss, want.loss_condition, 16)
        x = x - 0.5 * want.grad
    np.testing.assert_allclose(last, x, rtol=1e-5, atol=1e-5)


def test_grad_through_scan(rng):
    """Accumulated over chunks of tokens, with the global count as `normalizer`: the gradient of the whole batch."""
    logits, labels, options = random_case(rng, (12, 7), names=["weights"])
    weights, total = options["weights"].reshape(4, 3), options["weights"].sum()

    def whole(logits):
        def chunk(carry, xs):
            x, y, w = xs
            return carry + cross_entropy(x, y, weights=w, normalizer=total), None

        return -1.3 * jax.lax.scan(chunk, jnp.float32(0), (logits.reshape(4, 3, 7), labels.reshape(4, 3), weights))[0]

    want = reference.cross_entropy(logits, labels, weights=options["weights"], cotangent=-1.3)
    assert_within(jax.jit(jax.grad(whole))(logits), want.grad, want.grad_condition, 8)


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.everything_saveable], ids=["recompute", "save"])
def test_checkpoint_gives_the_same_gradient(variant, rng, policy):
    logits, labels, options = random_case(rng, (5, 7), names=ALONE)

    def loss(x):
        return 2.3 * cross_entropy(x, labels, **options)

    want = reference.cross_entropy(logits, labels, cotangent=2.3, **options)
    got = variant(jax.grad(jax.checkpoint(loss, policy=policy)))(logits)
    assert_within(got, want.grad, want.grad_condition, 8)


def test_a_second_backward_sees_the_same_residuals(variant, rng):
    logits, labels, options = random_case(rng, (5, 7), names=ALONE)
    _, pull = jax.vjp(variant(lambda x: cross_entropy(x, labels, **options)), jnp.asarray(logits))
    first, other, again = (np.asarray(pull(jnp.float32(c))[0]) for c in (0.7, -3.0, 0.7))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.nan  # jax_debug_nans switches donation off
@pytest.mark.compiled
def test_a_donated_buffer_changes_nothing(rng):
    logits, labels, options = random_case(rng, (5, 7), names=ALONE)
    f = jax.value_and_grad(lambda x: cross_entropy(x, labels, **options))
    kept = jnp.array(logits)
    want = jax.jit(f)(kept)
    given = jnp.array(logits)
    got = jax.jit(f, donate_argnums=0)(given)
    assert given.is_deleted() and not kept.is_deleted()
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)
