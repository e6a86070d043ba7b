"""Laws, and every door against float64, on inputs that hypothesis makes: ties, ±0, subnormals, ±inf, NaN, 1e±30, the
limits of the 16-bit formats.

A few hundred in the normal run, always the same ones; 31,000 by

    pytest tests/laws/test_properties.py --hypothesis-profile fuzz

Shapes and sets of options are few, so that compilation does not dominate: every number and every array is traced.

The budgets. A logit's exponent z - m is off by eps/2 of |z| + |m|, and so exp of it by as many eps/2 relatively; scale,
cap, exp, sum, log1p, product and reduction add one rounding each. The reference counts the first as the `condition`
(the sum of the terms, each times 1 + |z| + |m|), and 8 eps of it is more than the sum of all.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import assert_within, epsilon
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from softmax_jax import (
    SparseLabels,
    cross_entropy,
    kl_divergence,
    label_statistics,
    linear_cross_entropy,
    log_softmax,
    poly_loss_cross_entropy,
    safe_softmax_cross_entropy,
    softmax,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)

pytestmark = [pytest.mark.nan, pytest.mark.optimized]  # hypothesis draws NaN

EXTREMES = [0.0, -0.0, 1e-45, -1e-40, 1e-30, 1e30, -1e30, 88.8, -104.0, 17.0, 6e4, -6e4, np.inf, -np.inf, np.nan]
SHAPES = [(4, 7), (3, 1), (2, 19)]
LIMITS = [(float(f.smallest_subnormal), float(f.max)) for f in map(jnp.finfo, (jnp.bfloat16, jnp.float16))]
TINY = np.finfo(np.float32).tiny / epsilon(jnp.float32)  # products below the smallest number are 0
FORMATS = [jnp.float32, jnp.bfloat16, jnp.float16]

moderate = st.floats(-20, 20, width=32)


def extreme(dtype):
    """Numbers that the format rounds, and of the 16-bit formats' limits those within its range."""
    low, high = (float(getattr(jnp.finfo(dtype), end)) for end in ("smallest_subnormal", "max"))
    limits = [sign * x for ends in LIMITS for x in ends for sign in (1, -1) if low <= x <= high]
    return st.one_of(st.sampled_from(EXTREMES + limits), st.integers(-3, 3).map(float), moderate)


nonzero = st.floats(0.125, 4, width=32).flatmap(lambda x: st.sampled_from([x, -x]))
shapes, formats, flags = st.sampled_from(SHAPES), st.sampled_from(FORMATS), st.booleans()


def floats(shape, elements=moderate):
    return hnp.arrays(np.float32, shape, elements=elements)


def rounded(draw, shape, dtype, elements=None):
    """Numbers of a format, extreme ones unless `elements` says otherwise."""
    with np.errstate(over="ignore"):
        return draw(floats(shape, extreme(dtype) if elements is None else elements)).astype(dtype)


@st.composite
def cases(draw, elements=None, dense=None, with_options=None):
    """(logits, labels, options, cotangents) of 'none'."""
    shape = draw(shapes)
    batch, classes = shape[:-1], shape[-1]
    logits = rounded(draw, shape, draw(formats), elements)
    if draw(flags) if dense is None else dense:
        labels = draw(floats(shape, st.sampled_from([0.0, 0.0, 1.0, 0.25, 1e-6, 2.5])))
    else:
        labels = draw(hnp.arrays(np.int32, batch, elements=st.integers(-1, classes)))
    options = {}
    if draw(flags) if with_options is None else with_options:
        options = {
            "where": draw(hnp.arrays(bool, shape)),
            "weights": draw(floats(batch, st.sampled_from([0.0, 1.0, 0.5, 3.0]))),
            "class_weights": draw(floats(classes, st.sampled_from([0.0, 1.0, 0.3, 2.0]))),
            "label_smoothing": np.float32(draw(st.sampled_from([0.0, 0.1, 1.0]))),
            "z_loss": np.float32(draw(st.sampled_from([0.0, 1e-2]))),
            "logit_scale": np.float32(draw(st.sampled_from([1.0, 0.5, -2.0, 0.0]))),
        }
        if draw(flags):
            options["softcap"] = np.float32(draw(st.sampled_from([2.0, 30.0])))
    return logits, labels, options, draw(floats(batch, nonzero))


@partial(jax.jit, static_argnames="axis")
def losses_and_gradient(logits, labels, options, cotangents, axis=-1):
    losses, pull = jax.vjp(lambda z: cross_entropy(z, labels, axis=axis, reduction="none", **options), logits)
    return losses, pull(cotangents)[0]


def with_classes_on(axis, logits, labels, options):
    """The same case with its classes, the last axis so far, on `axis`."""
    move = lambda a: np.moveaxis(a, -1, axis)  # noqa: E731
    where = {"where": move(options["where"])} if "where" in options else {}
    return move(logits), move(labels) if labels.ndim == logits.ndim else labels, {**options, **where}


@np.errstate(over="ignore")
def in_range(want, dtype=jnp.float32):
    """What the format cannot hold is infinite."""
    return np.where(np.isinf(want.astype(dtype)), np.copysign(np.inf, want), want)


def loud(got, want, logits):
    """`want`, or inf where that is what came, in rows whose logits differ by so much that a sum of differences may
    leave the range."""
    with np.errstate(invalid="ignore", over="ignore"):
        spread = np.ptp(np.where(np.isfinite(np.float64(logits)), np.float64(logits), 0), -1)
    may = spread * logits.shape[-1] > float(np.finfo(np.float32).max) / 4
    return np.where(may & np.isposinf(got), np.inf, want)


def underflow(labels, cotangents):
    """An exponential below the smallest number is 0; what it is multiplied by (class weights ≤ 2, weights ≤ 3)."""
    mass = np.sum(labels, -1) if labels.ndim == 2 else 1
    return (TINY * 6 * (1 + mass) * np.abs(cotangents))[..., None]


def assert_gradient(gradient, want, labels, cotangents, dtype):
    """Of the rows whose loss is a number."""
    broken, condition = np.isnan(want.loss)[..., None], want.grad_condition + underflow(labels, cotangents)
    gradient, grad, condition = (np.where(broken, 0, a) for a in (gradient, in_range(want.grad), condition))
    assert_within(gradient, grad, condition, 8, dtype, "gradient")


def without_infinite_terms(logits, options):
    """z_loss of an infinite row, and a logit of 1e30 times a scale, leave float32 on the way: not asked here."""
    return not options or np.all(np.abs(np.nan_to_num(np.float64(logits), posinf=0, neginf=0)) < 1e6)


@given(cases(), st.sampled_from([-1, 0]))
def test_cross_entropy_is_the_float64_one_on_every_axis(case, axis):
    logits, labels, options, cotangents = case
    if not without_infinite_terms(logits, options):
        options = {}
    want = reference.cross_entropy(logits, labels, reduction="none", cotangent=np.float64(cotangents), **options)
    losses, gradient = losses_and_gradient(*with_classes_on(axis, logits, labels, options), cotangents, axis)
    assert_within(losses, loud(losses, in_range(want.loss), logits), want.loss_condition, 8, err_msg="loss")
    # A row that is NaN says so in its gradient, if any logit of it moves the loss: one that is hidden does not, nor one
    # capped from -inf. Which of its entries are 0 all the same is not asked.
    moving = (logits != -np.inf) | ("softcap" not in options)
    moving = np.any(moving & options.get("where", True), -1, keepdims=True)
    broken = np.isnan(want.loss)[..., None]
    gradient = np.moveaxis(np.asarray(gradient, np.float32), axis, -1)
    assert np.all(np.isnan(gradient).any(-1, keepdims=True) == (broken & moving))
    assert_gradient(gradient, want, labels, cotangents, logits.dtype)


@partial(jax.jit, static_argnums=(0, 1))
def value_and_pullback(f, axis, x, where, cotangent):
    y, pull = jax.vjp(lambda x: f(x, axis, where), x)
    return y, pull(cotangent)[0]


@st.composite
def rows(draw):
    """(x, where, cotangent) of one format, classes last."""
    shape, dtype = draw(shapes), draw(formats)
    where = draw(hnp.arrays(bool, shape)) if draw(flags) else None
    return rounded(draw, shape, dtype), where, draw(floats(shape)).astype(dtype)


@given(rows(), st.sampled_from([-1, 0]))
def test_softmax_and_log_softmax_are_the_float64_ones_on_every_axis(arrays, axis):
    x, where, cotangent = arrays
    dtype, exists, g = x.dtype, np.ones(x.shape, bool) if where is None else where, np.float64(cotangent)
    p = reference.softmax(x, where=where)
    broken = np.any((x == np.inf) & exists, -1, keepdims=True) | np.isnan(p).any(-1, keepdims=True)
    log_p = np.where(broken & exists, np.nan, reference.log_softmax(x, where=where))
    p = np.where(broken & exists, np.nan, p)
    # What is rounded on the way to exp(x - m) is the difference, and with it every term of the sum.
    finite = lambda a: np.where(np.isfinite(a), a, 0)  # noqa: E731
    with np.errstate(invalid="ignore"):
        size = 1 + np.abs(finite(np.float64(x) - np.max(x, -1, initial=-np.inf, where=exists, keepdims=True)))
    size = size + np.sum(finite(p) * size, -1, keepdims=True)
    turned = lambda a: None if a is None else np.moveaxis(a, -1, axis)  # noqa: E731
    run = lambda f: value_and_pullback(f, axis, *map(turned, (x, where, cotangent)))  # noqa: E731

    lost = TINY * (1 + np.sum(np.abs(g), -1, keepdims=True))  # a p below the smallest number is 0

    y, dx = (np.moveaxis(np.asarray(a), axis, -1) for a in run(softmax))
    assert_within(y, p, finite(p) * size, 4, dtype, "softmax")
    y = np.float64(y)  # the pullback starts from the result as it is stored
    terms = finite(y) * (np.abs(g) + np.sum(np.abs(g) * finite(y), -1, keepdims=True))
    assert_within(dx, y * (g - np.sum(g * y, -1, keepdims=True)), terms + lost, 8, dtype, "softmax's gradient")

    y, dx = (np.moveaxis(np.asarray(a), axis, -1) for a in run(log_softmax))
    assert_within(y, in_range(log_p, dtype), size, 4, dtype, "log_softmax")
    g = np.where(exists, g, 0)
    gradient = np.where(broken, np.nan, g - finite(p) * np.sum(g, -1, keepdims=True))
    terms = np.abs(g) + finite(p) * np.sum(np.abs(g), -1, keepdims=True) * size
    assert_within(dx, gradient, terms + lost, 8, dtype, "log_softmax's gradient")


@partial(jax.jit, static_argnums=0)
def value_and_gradient(f, logits, labels, where, cotangents):
    y, pull = jax.vjp(lambda z: f(z, labels) if where is None else f(z, labels, where=where), logits)
    return y, pull(cotangents)[0]


@pytest.mark.thorough
@given(cases(with_options=False), flags, st.data())
def test_doors_with_optaxs_names_are_the_float64_ones(case, masked, data):
    """Bitwise `cross_entropy` with reduction="none"; the poly loss is that plus 2 Σ t_v (1 - p_v)."""
    logits, labels, _, cotangents = case
    where = data.draw(hnp.arrays(bool, logits.shape)) if masked else None
    dense = labels.ndim == logits.ndim
    doors = [softmax_cross_entropy if dense else softmax_cross_entropy_with_integer_labels]
    doors += [safe_softmax_cross_entropy] if dense and where is None else []
    same = losses_and_gradient(logits, labels, {} if where is None else {"where": where}, cotangents)
    for door in doors:
        for got, want in zip(value_and_gradient(door, logits, labels, where, cotangents), same, strict=True):
            np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (got, want)), door.__name__)
    if dense:
        want = reference.poly_loss(logits, labels, where, np.float64(cotangents))
        losses, gradient = value_and_gradient(poly_loss_cross_entropy, logits, labels, where, cotangents)
        assert_within(losses, loud(losses, in_range(want.loss), logits), want.loss_condition, 8, err_msg="poly loss")
        assert_gradient(gradient, want, labels, cotangents, logits.dtype)


@st.composite
def heads(draw):
    """(x, weight, bias, labels, options, cotangents): 6 tokens of 3 numbers, 5 classes."""
    labels = hnp.arrays(np.int32, 6, elements=st.integers(-1, 5))
    dense = floats((6, 5), st.sampled_from([0.0, 0.0, 1.0, 0.25, 2.5]))
    options = {"weights": draw(floats(6, st.sampled_from([0.0, 1.0, 2.0])))}
    if draw(flags):
        options |= {
            "where": draw(hnp.arrays(bool, draw(st.sampled_from([(6, 5), (1, 5), (6, 1)])))),
            "class_weights": draw(floats(5, st.sampled_from([0.0, 1.0, 0.3, 2.0]))),
            "label_smoothing": np.float32(draw(st.sampled_from([0.0, 0.1, 1.0]))),
            "z_loss": np.float32(draw(st.sampled_from([0.0, 1e-2]))),
            "logit_scale": np.float32(draw(st.sampled_from([1.0, 0.5, -2.0]))),
            "softcap": np.float32(draw(st.sampled_from([2.0, 30.0]))),
        }
    operands = draw(floats((6, 3))), draw(floats((3, 5))), draw(floats(5))
    return *operands, draw(dense if draw(flags) else labels), options, draw(floats(6, nonzero))


@partial(jax.jit, static_argnums=(0, 1))
def head_losses_and_gradients(chunk_size, transpose, x, weight, bias, labels, options, cotangents):
    how = {"reduction": "none", "chunk_size": chunk_size, "transpose_weight": transpose}
    f = lambda x, w, b: linear_cross_entropy(x, w, labels, bias=b, **how, **options)  # noqa: E731
    losses, pull = jax.vjp(f, x, weight.T if transpose else weight, bias)
    dx, dweight, dbias = pull(cotangents)
    return losses, dx, dweight.T if transpose else dweight, dbias


@given(heads(), st.sampled_from([1, 4, 6]), flags)
def test_linear_cross_entropy_is_the_float64_one_at_every_chunk_size(head, chunk_size, transpose):
    x, weight, bias, labels, options, cotangents = head
    got = head_losses_and_gradients(chunk_size, transpose, *head)
    logits = np.float64(x) @ np.float64(weight) + bias
    # A logit is itself off by eps of this, and so is what is scaled.
    size = 1 + np.max(np.abs(x) @ np.abs(weight) + np.abs(bias)) * np.abs(options.get("logit_scale", 1))
    want = reference.cross_entropy(logits, labels, reduction="none", cotangent=np.float64(cotangents), **options)
    assert_within(got[0], want.loss, want.loss_condition * size, 8, err_msg="loss")
    d, c = want.grad, want.grad_condition * size + TINY
    assert_within(got[1], d @ weight.T, c @ np.abs(weight.T) + TINY, 16, err_msg="dx")
    assert_within(got[2], x.T @ d, np.abs(x.T) @ c + TINY, 16, err_msg="dweight")
    assert_within(got[3], d.sum(0), c.sum(0), 16, err_msg="dbias")


# Laws. Logits that are multiples of 1/8 are exact in all formats, and so is their sum with an integer.

eighths = st.integers(-64, 64).map(lambda n: n / 8)


@given(cases(eighths, with_options=False), st.integers(-60, 60))
def test_shift_invariance_is_bitwise(case, shift):
    logits, labels, options, cotangents = case
    logits = np.float32(logits)
    for a, b in zip(
        losses_and_gradient(logits, labels, options, cotangents),
        losses_and_gradient(logits + np.float32(shift), labels, options, cotangents),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@given(cases(moderate, dense=False), st.randoms(use_true_random=False))
def test_permutation_equivariance(case, random):
    logits, labels, options, cotangents = case
    classes = np.size(logits, -1)
    order = list(range(classes))
    random.shuffle(order)
    place = np.argsort(order)
    moved = {**options}
    for name in ("where", "class_weights"):
        if name in moved:
            moved[name] = moved[name][..., order]
    inside = (labels >= 0) & (labels < classes)
    there = np.where(inside, place[np.where(inside, labels, 0)], labels).astype(np.int32)
    losses, gradient = losses_and_gradient(logits, labels, options, cotangents)
    losses_moved, gradient_moved = losses_and_gradient(logits[..., order], there, moved, cotangents)
    want = reference.cross_entropy(logits, labels, reduction="none", cotangent=np.float64(cotangents), **options)
    assert_within(losses_moved, np.float64(losses), want.loss_condition, 8)
    condition = want.grad_condition[..., order]
    assert_within(gradient_moved, np.float64(gradient)[..., order], condition, 8, logits.dtype)


@given(cases(moderate, dense=False, with_options=False))
def test_integer_labels_are_one_hot_ones_and_gradient_rows_sum_to_zero(case):
    logits, labels, _, cotangents = case
    logits, labels = np.float32(logits), np.clip(labels, 0, np.size(logits, -1) - 1)
    one_hot = np.eye(np.size(logits, -1), dtype=np.float32)[labels]
    want = reference.cross_entropy(logits, labels, reduction="none", cotangent=np.float64(cotangents))
    losses, gradient = losses_and_gradient(logits, labels, {}, cotangents)
    same, dense = losses_and_gradient(logits, one_hot, {}, cotangents)
    assert_within(same, np.float64(losses), want.loss_condition, 8)
    assert_within(dense, np.float64(gradient), want.grad_condition, 8)
    rows = np.sum(np.float64(gradient), -1)
    assert np.all(np.abs(rows) <= 8 * epsilon(jnp.float32) * want.grad_condition.sum(-1) + 1e-37)
    assert_within(softmax_cross_entropy(logits, one_hot), np.float64(same), 0 * want.loss_condition, 0)
    np.testing.assert_allclose(np.sum(softmax(logits), -1), 1, rtol=np.size(logits, -1) * epsilon(jnp.float32))


@given(cases(moderate, dense=False, with_options=False), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_smoothing_is_mixed_dense_labels(case, smoothing):
    logits, labels, _, cotangents = case
    logits, classes = np.float32(logits), np.size(logits, -1)
    one_hot = np.eye(classes, dtype=np.float32)[np.clip(labels, 0, classes - 1)]
    mixed = (np.float32(1 - smoothing) * one_hot + np.float32(smoothing / classes)).astype(np.float32)
    want = reference.cross_entropy(logits, mixed, reduction="none", cotangent=np.float64(cotangents))
    got = losses_and_gradient(logits, one_hot, {"label_smoothing": np.float32(smoothing)}, cotangents)
    # The mixed labels are themselves rounded twice, which is a part of the condition.
    assert_within(got[0], want.loss, want.loss_condition, 12)
    assert_within(got[1], want.grad, want.grad_condition, 12)


@jax.jit
def mean_and_gradient(logits, labels, weights):
    return jax.value_and_grad(cross_entropy)(logits, labels, weights=weights)


@given(cases(with_options=False), st.data())
def test_weights_of_0_and_1_are_dropping_rows(case, data):
    """In the mean, whatever the dropped rows hold."""
    logits, labels, _, _ = case
    labels = np.clip(labels, 0, np.size(logits, -1) - 1) if labels.ndim == 1 else labels
    kept = data.draw(hnp.arrays(bool, logits.shape[:-1]))
    mean, gradient = mean_and_gradient(logits, labels, kept)
    want, count = reference.cross_entropy(logits[kept], labels[kept]), kept.sum()
    loss = in_range(want.loss * count) / count if count else np.float64(0)  # the sum may leave the range
    assert_within(mean, loss, want.loss_condition * kept.any(), 8)
    condition = want.grad_condition + underflow(labels[kept], 1)
    assert_within(np.asarray(gradient)[kept], in_range(want.grad), condition, 8, logits.dtype)
    assert not np.any(np.asarray(gradient, np.float32)[~kept])


@given(shapes.flatmap(lambda s: st.tuples(floats(s), hnp.arrays(np.int32, s[:-1], elements=st.integers(0, s[-1] - 1)))))
def test_the_z_losss_derivative_is_the_squared_log_normalizer(arrays):
    logits, labels = arrays
    loss = lambda z_loss: cross_entropy(logits, labels, z_loss=z_loss, reduction="sum")  # noqa: E731
    z = np.float64(logits)
    log_normalizer = z.max(-1) + np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1))
    # A log_normalizer is off by a few eps of its condition, 1 + 2 max|z|, and its square by that times
    # 2 |log_normalizer| (and by that squared, which is less than that times 1).
    condition = np.sum(2 * (1 + np.abs(log_normalizer)) * (1 + 2 * np.abs(z).max(-1)))
    assert_within(jax.grad(loss)(np.float32(0.3)), np.sum(log_normalizer**2), condition, 8)


# Labels of a few classes, statistics and divergences, under the same budgets.


@given(cases(dense=False), st.data())
def test_sparse_labels_are_the_dense_ones_that_they_mean(case, data):
    """Entries twice, of probability 0, of no class; with and without something for the others."""
    logits, ids, options, cotangents = case
    if not without_infinite_terms(logits, options):
        options = {}
    classes, some = np.size(logits, -1), st.sampled_from([0.0, 1.0, 0.25, 1e-6, 2.5])
    ids = np.stack([ids, *(data.draw(hnp.arrays(np.int32, ids.shape, elements=st.integers(-1, classes))),) * 2], -1)
    probs = data.draw(floats(ids.shape, some))
    exists = np.broadcast_to(options.get("where", True), logits.shape)
    # A share of a class at -inf is an infinite loss, or NaN, as SparseLabels say.
    spread = not np.any(np.isneginf(np.float32(logits)) & exists) and data.draw(flags)
    labels = SparseLabels(ids, probs, data.draw(floats(ids.shape[:-1], some)) if spread else None)

    meant = reference.dense_labels(*labels, exists)
    want = reference.cross_entropy(logits, meant, reduction="none", cotangent=np.float64(cotangents), **options)
    if labels.others is not None:  # what the few have is taken as a difference to a share of it, times m - z
        share = np.float64(labels.others) * 6  # weights, class weights
        distance = 1 + 2 * np.ptp(np.nan_to_num(np.float64(logits), posinf=0, neginf=0), -1)  # logit_scale
        want = want._replace(
            loss_condition=want.loss_condition + share * distance,
            grad_condition=want.grad_condition + (share * np.abs(cotangents))[..., None],
        )
    losses, gradient = losses_and_gradient(logits, labels, options, cotangents)
    assert_within(losses, loud(losses, in_range(want.loss), logits), want.loss_condition, 16, err_msg="loss")
    assert_gradient(np.asarray(gradient, np.float32), want, np.nan_to_num(meant), cotangents, logits.dtype)


@jax.jit
def statistics_and_gradient(logits, labels, options, cotangents):
    def floats_of(logits):
        found = label_statistics(logits, labels, **options)
        return (found.log_prob, found.log_normalizer, found.entropy), (found.correct, found.rank)

    values, pull, others = jax.vjp(floats_of, logits, has_aux=True)
    return (*values, *others), pull(cotangents)[0]


@given(st.data())
def test_label_statistics_are_the_float64_ones(data):
    shape, dtype = data.draw(shapes), data.draw(formats)
    logits = rounded(data.draw, shape, dtype)
    logits = np.where(np.abs(np.float32(logits)) < 2e-38, 0, logits).astype(dtype)  # where ranks are ties
    labels = data.draw(hnp.arrays(np.int32, shape[:-1], elements=st.integers(-1, shape[-1])))
    options = {}
    if data.draw(flags):
        options = {"where": data.draw(hnp.arrays(bool, shape)), "logit_scale": np.float32(data.draw(nonzero))}
        if data.draw(flags):
            options["softcap"] = np.float32(data.draw(st.sampled_from([2.0, 30.0])))
        if not without_infinite_terms(logits, options):
            options = {}
    cotangents = tuple(data.draw(floats(shape[:-1], nonzero)) for _ in range(3))
    want = reference.label_statistics(logits, labels, cotangents, **options)
    got, gradient = statistics_and_gradient(logits, labels, options, cotangents)

    exists = np.broadcast_to(options.get("where", True), shape)
    empty = ~exists.any(-1)
    broken = np.isnan(want.values[1]) & ~empty
    bad = (broken | (labels < 0) | (labels >= shape[-1])) & ~empty
    for value, truth, condition, nan in zip(got, want.values, want.conditions, (bad, broken, broken), strict=False):
        truth = np.where(empty, 0, np.where(nan, np.nan, in_range(truth)))
        assert_within(value, truth, np.where(empty | nan, 0, condition), 16)
    correct, rank = got[3:]
    if "softcap" not in options:  # which makes ties by rounding
        np.testing.assert_array_equal(correct, want.values[3] & ~bad & ~empty)
        np.testing.assert_array_equal(rank, np.where(empty, 0, np.where(bad, -1, want.values[4])))
    dead = (bad | empty)[..., None]
    truth, condition = (np.where(dead, 0, a) for a in (in_range(want.grad), want.grad_condition))
    assert_within(np.where(dead, 0, np.float32(gradient)), truth, condition, 16, dtype, "gradient")


def bounded(logits):
    """Those of less than 1e4, and infinities: beyond, a divergence is infinite or 0."""
    return np.where(np.isinf(np.float32(logits)), logits, np.clip(np.float32(logits), -1e4, 1e4)).astype(logits.dtype)


@partial(jax.jit, static_argnums=0)
def divergence_and_gradients(beta, teacher, student, options, cotangents):
    f = lambda b, a: kl_divergence(a, teacher_logits=b, beta=beta, reduction="none", **options)  # noqa: E731
    value, pull = jax.vjp(f, teacher, student)
    return value, pull(cotangents)


@given(st.data(), st.sampled_from([0.0, 0.25, 1.0]))
@reference.quiet
def test_divergences_are_the_float64_ones(data, beta):
    shape, dtype = data.draw(shapes), data.draw(formats)
    teacher, student = (bounded(rounded(data.draw, shape, dtype)) for _ in range(2))
    # A probability that float32 flushes to 0 and the other's at -inf: 0 or inf, by rounding.
    for a, b in ((teacher, student), (student, teacher)):
        with np.errstate(over="ignore", invalid="ignore"):
            top = np.max(np.nan_to_num(np.float32(a), nan=-np.inf), -1, keepdims=True)
            b[(b == -np.inf) & (np.float32(a) < top - 80)] = -60
    options = {}
    if data.draw(flags):
        options = {
            "where": data.draw(hnp.arrays(bool, shape)),
            "temperature": np.float32(data.draw(st.sampled_from([0.5, 1, 3]))),
        }
        options["weights"] = data.draw(floats(shape[:-1], st.sampled_from([0.0, 1.0, 0.5])))
    cotangents = data.draw(floats(shape[:-1], nonzero))
    value, gradients = divergence_and_gradients(beta, teacher, student, options, cotangents)

    exists = np.broadcast_to(options.get("where", True), shape)
    weights = np.where(exists.any(-1), options.get("weights", 1.0), 0)
    scale = 1 / np.float64(options.get("temperature", 1))
    zs = [reference._adjust(np.float64(z), exists, scale, None)[0] for z in (teacher, student)]
    want = reference.divergence(*zs, beta, exists)
    unused, broken = weights == 0, np.isnan(want.loss)
    truth = np.where(unused, 0, weights * want.loss)
    # A p or t below the smallest number is 0, beside a logarithm of this size.
    size = np.max([np.ptp(np.where(np.isfinite(z), z, 0), -1) for z in zs], 0) + 90
    lost = TINY * size * shape[-1]
    # A term is right to the 2e-6 that its series leaves; none is negative.
    condition = want.loss_condition + lost + np.abs(want.loss) * 2e-6 / (16 * epsilon(np.float32))
    assert_within(value, truth, np.where(unused | ~np.isfinite(truth), 0, weights * condition), 16)
    infinite = unused | broken | np.isinf(truth)
    for got, grad, condition in zip(gradients, want.grads, want.grad_conditions, strict=True):
        got, factor = np.asarray(got, np.float32), (weights * cotangents)[..., None]
        assert np.all(got[unused] == 0) and np.all(np.isnan(got[broken & ~unused]).any(-1))
        grad, condition = (np.where(infinite[..., None] | ~exists, 0, a) for a in (grad * scale, condition * scale))
        got = np.where(infinite[..., None], 0, got)
        assert_within(got, grad * factor, np.abs(factor) * (condition + lost[..., None] * scale), 16, dtype, "gradient")
