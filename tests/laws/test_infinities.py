"""Very large logits, infinite ones, soft caps, hidden labels: rows 19 to 23 of the table in test_failures.py."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import assert_within, check_against_reference, epsilon, few_of, loss_and_grad, random_case

from softmax_jax import (
    SparseLabels,
    cross_entropy,
    kl_divergence,
    label_statistics,
    linear_cross_entropy,
    linear_kl_divergence,
    log_softmax,
    poly_loss_cross_entropy,
    softmax,
)

INF = np.inf
both = pytest.mark.parametrize("dense", few_of([False, True]), ids=["integer", "dense"])


@pytest.mark.diagonal
@pytest.mark.optimized
@both
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("offset", [1e4, -1e4, 1e7, -1e7, 6e4, 3e38, -3e38])
def test_very_large_logits(rng, offset, dtype, dense):
    if abs(offset) > float(jnp.finfo(dtype).max) / 1.01:
        pytest.skip("more than the dtype holds")
    logits, labels, _ = random_case(rng, (5, 7), dense=dense)
    step = abs(offset) * epsilon(dtype)  # the coarseness of logits there
    logits = (np.float64(offset) + np.round(logits) * max(step, 1)).astype(dtype)
    logits[:, 0] = -logits[:, 0] if offset < 0 else logits[:, 0]  # and far apart
    options = {"label_smoothing": np.float32(0)}
    want = reference.cross_entropy(logits, labels, reduction="none", **options)
    if np.abs(want.loss).max() > 3e38:
        pytest.skip("the loss is more than float32 holds")
    loss, grad = loss_and_grad(jax.jit, logits, labels, np.ones(5, np.float32), {"reduction": "none"})
    assert_within(loss, want.loss, 20 + abs(want.loss), 8)  # differences of logits are exact or rounded once
    assert_within(grad, want.grad, want.grad * 0 + 20 * (1 + (labels.sum(-1, keepdims=True) if dense else 0)), 8, dtype)


@pytest.mark.diagonal
@both
@pytest.mark.parametrize(
    "names", few_of([["class_weights", "logit_scale", "where"], [], ["logit_scale"], ["z_loss"]]), ids=str
)
def test_zero_times_infinity_is_zero(rng, names, dense):
    """Classes of probability zero (-inf) with target 0 are as if they did not exist."""
    logits, labels, options = random_case(rng, (5, 7), dense=dense, names=names)
    logits[:, 2] = -INF
    labels = np.where(np.arange(7) == 2, 0, labels) if dense else np.where(labels == 2, 3, labels).astype(np.int32)
    if "where" in names:
        options["where"][:, 3] = True
    for reduction in ("mean", "none"):
        check_against_reference(jax.jit, rng, logits, labels, options | {"reduction": reduction})
    loss, grad = loss_and_grad(jax.jit, logits, labels, np.float32(0.7), options | {"label_smoothing": 0.0})
    assert np.isfinite(loss) and np.all(np.isfinite(grad)) and np.all(grad[:, 2] == 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("share", [1e-30, 0.5])
def test_a_dense_label_on_a_class_of_probability_zero_is_infinite(dtype, share):
    with jax.enable_x64(True):
        logits = np.array([[0, -INF, 1], [0, -INF, 1]], dtype)
        labels = np.array([[0.25, share, 0], [0.25, 0, 0]], dtype)
        losses = np.asarray(cross_entropy(logits, labels, reduction="none"))
        assert losses.dtype == dtype and losses[0] == INF
        np.testing.assert_allclose(losses[1], 0.25 * np.log1p(np.e), rtol=1e-6)


def test_the_lowest_logit_of_all(rng):
    """A maximum of -3.4e38 has a number below it."""
    logits = np.full((2, 3), np.finfo(np.float32).min)
    logits[1, 1:] = -INF
    labels = rng.random((2, 3)).astype(np.float32)
    labels[1, 1:] = 0
    losses = cross_entropy(logits, labels, reduction="none")
    np.testing.assert_allclose(losses, [labels[0].sum() * np.log(3), 0], rtol=1e-6)
    np.testing.assert_allclose(log_softmax(logits), [[-np.log(3)] * 3, [0, -INF, -INF]], rtol=1e-6)


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_hot_labels_beside_a_class_that_is_almost_the_maximum(dtype):
    """All others are -inf: none of them may be taken for the largest, how small the gap to it ever is."""
    with jax.enable_x64(True):
        eps = np.finfo(dtype).eps
        gaps = [0, 1e-300, 5e-38, 1e-20, eps, 2 * eps, 4 * eps, 4 * eps + 5e-38, 5 * eps, 16 * eps, 1, 1 + 16 * eps]
        pairs = [(m, m - gap) for m in (0, 4 * eps, 1, 1 + 16 * eps, 2, -1, 1e7) for gap in gaps]
        pairs += [(m, m - 1 - 16 * eps * m - 5e-38) for m in (1, 1 + 16 * eps)]  # a gap of about 1 and 5e-38
        logits = np.full((len(pairs), 8), -INF, dtype)
        logits[:, 7], logits[:, 0] = np.array(pairs).T
        one_hot = np.eye(8, dtype=dtype)[np.arange(len(pairs)) % 2 * 7]
        got = loss_and_grad(jax.jit, logits, one_hot, np.ones(len(pairs), dtype), {"reduction": "none"})
        want = loss_and_grad(jax.jit, logits, one_hot.argmax(-1), np.ones(len(pairs), dtype), {"reduction": "none"})
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=16 * eps, atol=0)


@both
def test_a_smoothed_class_of_probability_zero_is_infinite(rng, dense):
    logits, labels, _ = random_case(rng, (5, 7), dense=dense)
    logits[1, 2] = -INF
    labels[1] = np.arange(7) == 3 if dense else 3
    options = {"label_smoothing": np.float32(0.1), "reduction": "none"}
    losses = np.asarray(cross_entropy(logits, labels, **options))
    np.testing.assert_array_equal(np.isinf(losses), np.arange(5) == 1)
    assert losses[1] == INF
    hidden = {"where": np.isfinite(logits)}
    check_against_reference(jax.jit, rng, logits, labels, options | hidden)
    zero_class = {"class_weights": np.float32([1, 2, 0, 1, 1, 1, 1])}  # a class weight of 0 wins
    check_against_reference(jax.jit, rng, logits, labels, options | zero_class)


def test_a_cotangent_of_zero_beside_an_infinite_loss(rng):
    """Nothing comes of it: 0 · inf is 0, in the gradients of dense labels and of class weights too."""
    logits, labels, _ = random_case(rng, (3, 7), dense=True)
    logits[1, 2], c = -INF, np.float32([1, 2, 0, 1, 1, 1, 1])
    cotangent = np.float32([1.3, 0, -0.4])

    def weighted(logits, labels, c):
        losses = cross_entropy(logits, labels, class_weights=c, label_smoothing=0.1, reduction="none")
        return jnp.sum(jnp.where(cotangent == 0, 0, cotangent * losses))

    every = jax.jit(jax.grad(weighted, (0, 1, 2)))
    for c_of_it in (0, 1):
        c[2] = c_of_it
        got = every(logits, labels, c)
        want = every(logits[[0, 2, 2]], labels[[0, 2, 2]], c)  # the cotangent of the middle one is 0
        for a, b in zip(got, want, strict=True):
            a, b = (np.asarray(x)[[0, 2]] if x.ndim == 2 else x for x in (a, b))
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert not np.any(got[0][1]) and not np.any(got[1][1])


def test_a_class_of_weight_zero_at_minus_infinity_has_a_finite_gradient(rng):
    """0 · -inf is 0 in the loss, and so is the slope of its smoothed part."""
    logits, labels, _ = random_case(rng, (3, 7))
    logits[:, 2], labels[labels == 2] = -INF, 3
    c = np.float32([1, 2, 0, 1, 1, 1, 1])
    of_weights = jax.jit(
        jax.grad(lambda c: cross_entropy(logits, labels, class_weights=c, label_smoothing=0.1, reduction="sum"))
    )
    got, z = np.asarray(of_weights(c)), np.float64(logits)
    spread = np.log(np.exp(z).sum(-1))
    want = np.where(np.isfinite(z), spread[:, None] - np.where(np.isfinite(z), z, 0), 0)
    want[:, 2] = spread - logits.max(-1)  # what is left of log_normalizer - z_v where z_v - m counts as 0
    want = 0.1 / 7 * want + 0.9 * want * (np.arange(7) == labels[:, None])
    np.testing.assert_allclose(got, want.sum(0), rtol=1e-5)


def test_smoothing_has_a_gradient_beside_a_row_without_classes(rng):
    logits, labels, _ = random_case(rng, (3, 7))
    where = np.ones((3, 7), bool)
    where[1] = False
    of_smoothing = jax.jit(
        jax.grad(lambda e, z, y, w: cross_entropy(z, y, where=w, label_smoothing=e, reduction="sum"))
    )
    got, kept = of_smoothing(0.1, logits, labels, where), [0, 2]
    np.testing.assert_allclose(got, of_smoothing(0.1, logits[kept], labels[kept], where[kept]), rtol=1e-5)


def test_a_class_weight_of_zero_wins_over_an_infinite_loss(rng):
    logits, labels, _ = random_case(rng, (5, 7))
    labels[1], logits[1, 2] = 2, -INF
    c = np.float32([1, 2, 0, 1, 1, 1, 1])
    for where in (None, np.arange(7) != 2):
        labels = np.where((labels == 2) & (np.arange(5) != 1), 3, labels).astype(np.int32)
        options = {"class_weights": c, "reduction": "none"} | ({} if where is None else {"where": where})
        want = reference.cross_entropy(logits, labels, **options)
        got = np.asarray(cross_entropy(logits, labels, **options))
        assert got[1] == 0 and np.all(np.isfinite(want.loss))
        assert_within(got, want.loss, want.loss_condition, 8)


@pytest.mark.optimized
@pytest.mark.parametrize("total", [0.0, 0.3, 1.0, 7.0])
def test_soft_labels_of_any_sum(rng, total):
    """The gradient is T p - t, not p - t."""
    logits, labels, _ = random_case(rng, (5, 7), dense=True)
    labels = labels / labels.sum(-1, keepdims=True) * np.float32(total)
    check_against_reference(jax.jit, rng, logits, labels, {"reduction": "none"})
    _, grad = loss_and_grad(jax.jit, logits, labels, np.full(5, 0.7, np.float32), {"reduction": "none"})
    want = 0.7 * (total * reference.softmax(logits) - labels)
    assert_within(grad, want, 20 * (abs(want) + labels + 0.01), 8)


@pytest.mark.optimized
@both
@pytest.mark.parametrize("names", [["softcap"], ["softcap", "logit_scale"]], ids=len)
def test_the_labels_own_logit_is_capped_too(rng, names, dense):
    """Logits far above the cap: an uncapped label would give a negative loss."""
    logits, labels, options = random_case(rng, (5, 7), dense=dense, names=names)
    logits *= 20
    check_against_reference(jax.jit, rng, logits, labels, options | {"reduction": "none"})
    assert np.all(np.asarray(cross_entropy(logits, labels, reduction="none", **options)) >= 0)


@pytest.mark.parametrize("softcap", [None, np.float32(5)])
@pytest.mark.nan
def test_infinities_are_judged_on_the_raw_logit(rng, softcap):
    """A scale of 0 or below leaves -inf a class of probability zero; a cap makes it -softcap; +inf stays NaN."""
    logits, labels, _ = random_case(rng, (4, 7))
    logits[:2, 2], logits[3, 4] = -INF, INF
    labels[:2] = 3
    capped = {} if softcap is None else {"softcap": softcap}
    cotangent = rng.normal(size=4).astype(np.float32)
    through_scale = jax.jit(
        jax.grad(lambda s: cross_entropy(logits[:3], labels[:3], reduction="sum", logit_scale=s, **capped))
    )
    for scale in np.array([0.7, -0.7, 0.0], np.float32):
        options = {"logit_scale": scale, "reduction": "none", **capped}
        want = reference.cross_entropy(logits, labels, cotangent=np.float64(cotangent), **options)
        loss, grad = loss_and_grad(jax.jit, logits, labels, cotangent, options)
        assert np.isnan(loss[3]) and np.all(np.isfinite(loss[:3])) and np.all(np.isnan(grad[3]) | (np.arange(7) == 4))
        assert_within(loss, want.loss, want.loss_condition, 8)
        assert_within(grad[:3], want.grad[:3], want.grad_condition[:3] + epsilon(jnp.float32), 8)
        assert np.isfinite(through_scale(scale))


@both
@pytest.mark.nan
@pytest.mark.parametrize("held", [np.nan, np.inf, -np.inf])
def test_a_hidden_class_may_hold_anything_and_be_scaled_and_capped(variant, rng, dense, held):
    """Its gradient is 0, and it adds nothing to those of scale and cap."""
    logits, labels, options = random_case(rng, (4, 7), dense=dense, names=["where", "logit_scale", "softcap"])
    hidden, floats = ~options.pop("where"), {name: options.pop(name) for name in ("logit_scale", "softcap")}
    assert hidden.any()

    @variant
    def gradients(logits):
        loss = lambda z, floats: cross_entropy(z, labels, where=~hidden, **floats, **options)  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))(logits, jax.tree.map(jnp.asarray, floats))

    got, want = (gradients(jnp.asarray(np.where(hidden, np.float32(x), logits))) for x in (held, 0))
    assert np.isfinite(want[0])
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(g, w)


@pytest.mark.nan
def test_a_hidden_class_may_hold_nan_beside_class_weights(rng):
    """In its logits, in its dense labels and in its own class weight: no gradient has one."""
    logits, labels, options = random_case(rng, (4, 7), dense=True, names=["class_weights", "label_smoothing"])
    exists = np.arange(7) != 2
    smoothing = options["label_smoothing"]

    def loss(z, t, c):
        return cross_entropy(z, t, where=exists, class_weights=c, label_smoothing=smoothing)

    operands = logits, labels, options["class_weights"]
    held = [np.where(exists, a, np.float32(np.nan)) for a in operands]
    got, want = (jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*o) for o in (held, operands))
    seen = reference.cross_entropy(logits, labels, where=exists, **options)
    assert_within(got[0], seen.loss, seen.loss_condition, 8)
    for g, w in zip(got[1], want[1], strict=True):
        np.testing.assert_array_equal(g, w)
        assert np.all(np.asarray(g)[..., 2] == 0)


def test_a_traced_z_loss_of_0_over_huge_logits():
    """Not 0 times an infinite square."""
    logits, labels = np.array([[3e30, 1, 0]], np.float32), np.array([1])
    loss, grad = jax.jit(jax.value_and_grad(lambda z, q: cross_entropy(z, labels, z_loss=q)))(logits, 0.0)
    assert loss == np.float32(3e30)
    np.testing.assert_array_equal(grad, [[1, -1, 0]])


@both
def test_a_hidden_label_is_infinite_or_dropped_and_never_negative(rng, dense):
    """An integer label on a hidden class: inf. Dense mass on a hidden class is left out, with gradient 0."""
    logits, labels, _ = random_case(rng, (4, 7), dense=dense)
    logits[:, 2] += 20  # hidden, and far above the others: log_normalizer - z_y would be negative
    labels = labels + np.float32(0.1) if dense else np.where(np.arange(4) == 1, 2, 3).astype(np.int32)
    options = {"where": np.arange(7) != 2, "reduction": "none"}
    losses = np.asarray(cross_entropy(logits, labels, **options))
    if dense:
        check_against_reference(jax.jit, rng, logits, labels, options)
        d_labels = jax.grad(lambda t: 0.7 * jnp.sum(cross_entropy(logits, t, **options)))(labels)
        want = -0.7 * reference.log_softmax(logits, where=options["where"])
        assert_within(d_labels, np.where(options["where"], want, 0), 20 * np.ones((4, 7)), 8)
    else:
        np.testing.assert_array_equal(losses == INF, np.arange(4) == 1)
    assert np.all(losses >= 0)


@both
def test_a_traced_smoothing_of_zero_over_minus_infinity_has_class_weight_gradients(dense):
    """A cotangent of 0 times -inf is 0: the gradient is that without smoothing."""
    logits = jnp.array([[1.0, 2.0, -INF], [0.0, 1.0, 2.0]])
    labels = jnp.array([[0.25, 0.75, 0.0], [0.0, 1.0, 0.0]]) if dense else jnp.array([0, 1])
    gradient = jax.grad(lambda c, e: cross_entropy(logits, labels, class_weights=c, label_smoothing=e))
    both = jax.jit(lambda c, e: (gradient(c, e), gradient(c, 0.0)))
    np.testing.assert_array_equal(*both(jnp.ones(3), jnp.float32(0)))


@pytest.mark.nan
@pytest.mark.parametrize("smoothing", [1.0, np.float32(1)])
def test_a_smoothing_of_1_beside_a_hidden_label_has_class_weight_gradients(smoothing):
    """Nothing is left of the label's own loss, which is infinite: a factor of 0 wins."""
    logits, labels, where = jnp.float32([[1, 2, 3]]), jnp.array([2]), jnp.array([True, True, False])
    loss = lambda c: cross_entropy(  # noqa: E731
        logits, labels, where=where, class_weights=c, label_smoothing=smoothing, reduction="sum"
    )
    np.testing.assert_allclose(jax.grad(loss)(jnp.ones(3)), [(np.log1p(np.e) - 0) / 2, np.log1p(1 / np.e) / 2, 0], 1e-6)


@pytest.mark.nan
@pytest.mark.parametrize("jitted", [True, False])
def test_a_row_that_is_hidden_whole_makes_no_nan_inside(jitted):
    """Under `jax_debug_nans`, also where each operation is looked at by itself."""
    logits, where = jnp.float32([[1, 2, 3], [0, 1, 0]]), jnp.array([[True, True, False], [False] * 3])
    targets, ids = jnp.full((2, 3), 1 / 3), jnp.array([0, 1])
    with jax.disable_jit(not jitted), jax.debug_nans(True):
        for f in (
            lambda z: jnp.where(where, log_softmax(z, where=where), 0),
            lambda z: softmax(z, where=where) ** 2,
            lambda z: cross_entropy(z, targets, where=where),
            lambda z: cross_entropy(z, ids, where=where, label_smoothing=0.1),
            lambda z: kl_divergence(z, teacher_logits=2 * z, where=where),
            lambda z: label_statistics(z, ids, where=where).entropy,
            lambda z: poly_loss_cross_entropy(z, targets, where=where),
        ):
            value, pull = jax.vjp(f, logits)
            assert not jnp.any(pull(jnp.ones_like(value))[0][1])


def losses_of_weights():
    """Each with one number a token of weights w, of logits or hidden states z."""
    ids, head, teacher = jnp.array([0, 1, 2]), jnp.eye(3), jnp.float32([[0, 1, 2], [1, 1, 0], [2, 0, 1]])
    probs = jax.nn.softmax(teacher)
    return {
        "ids": lambda z, w, **how: cross_entropy(z, ids, weights=w, **how),
        "options": lambda z, w, **how: cross_entropy(
            z, ids, weights=w, label_smoothing=0.1, z_loss=1e-2, softcap=5.0, class_weights=jnp.arange(1.0, 4.0), **how
        ),
        "dense": lambda z, w, **how: cross_entropy(z, probs, weights=w, **how),
        "sparse": lambda z, w, **how: cross_entropy(
            z, SparseLabels(jnp.array([[0, 2]] * 3), probs[:, :2], probs[:, 2]), weights=w, **how
        ),
        "head": lambda z, w, **how: linear_cross_entropy(z, head, ids, weights=w, **how),
        "head, chunks": lambda z, w, **how: linear_cross_entropy(z, head, ids, weights=w, chunk_size=2, **how),
        "divergence": lambda z, w, **how: kl_divergence(z, teacher_logits=teacher, weights=w, **how),
        "mixture": lambda z, w, **how: kl_divergence(z, teacher_logits=teacher, weights=w, beta=0.3, **how),
        "probabilities": lambda z, w, **how: kl_divergence(z, teacher_probs=probs, weights=w, **how),
        "divergence of a head": lambda z, w, **how: linear_kl_divergence(
            z, head, teacher_logits=teacher, weights=w, **how
        ),
    }


@pytest.mark.whole
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", losses_of_weights())
def test_the_derivative_by_a_weight_of_0_is_the_loss_of_its_row(name, reduction):
    """And with logits, hidden states and heads p - t, as at any other weight: learning to reweight takes its gradient
    there. A row that is not finite has none, and leaves all other gradients as they are."""
    loss = partial(losses_of_weights()[name], reduction=reduction)
    z, w = jnp.float32([[1, 0, 2], [0, 3, 1], [2, 2, 0]]), jnp.float32([0, 1, 1])
    by_weights = jax.grad(loss, 1)
    at_0, near = by_weights(z, w), by_weights(z, w.at[0].set(1e-4))
    np.testing.assert_allclose(at_0, near, rtol=1e-3)
    forward = jax.jvp(partial(loss, z, forward_mode=True), (w,), (jnp.eye(3)[0],))[1]
    np.testing.assert_allclose(forward, at_0[0], rtol=1e-6)
    mixed = lambda w: jax.jacobian(jax.grad(loss), 1)(z, w)  # noqa: E731
    np.testing.assert_allclose(mixed(w), mixed(w.at[0].set(1e-4)), atol=1e-4)
    for lost in (jnp.nan, jnp.inf):
        other = z.at[0].set(lost)
        dz, dw = jax.grad(loss, (0, 1))(other, w)
        assert not jnp.any(dz[0])
        np.testing.assert_allclose(dz[1:], jax.grad(loss)(z, w)[1:], rtol=1e-6)
        np.testing.assert_allclose(dw[1:], at_0[1:], rtol=1e-6)


def test_learning_to_reweight_from_weights_of_0():
    """A step of logits, or of a head, by a weighted loss; the gradient of another by the weights (Ren et al., 2018)."""
    z, ids, w = jnp.float32([[1, 0, 2], [0, 3, 1], [2, 2, 0]]), jnp.array([0, 1, 2]), jnp.zeros(3)
    naive = lambda z, y: -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], -1)[:, 0]  # noqa: E731

    def after(step, operand):
        return lambda w: jnp.sum(naive(operand - 0.1 * jax.grad(step, 0)(operand, w), ids[::-1]))

    for ours, usual in (
        (lambda z, w: cross_entropy(z, ids, weights=w, reduction="sum"), lambda z, w: jnp.sum(w * naive(z, ids))),
        (
            lambda h, w: linear_cross_entropy(z, h, ids, weights=w, reduction="sum"),
            lambda h, w: jnp.sum(w * naive(z @ h, ids)),
        ),
    ):
        start = jnp.eye(3)
        want = jax.grad(after(usual, start))(w)
        assert jnp.all(jnp.abs(want) > 1e-3)
        np.testing.assert_allclose(jax.grad(after(ours, start))(w), want, rtol=1e-5)
