"""SparseLabels, label_statistics and kl_divergence against float64 on the inputs of test_properties.py, as often as
there, under the same budgets."""

from functools import partial

import jax
import numpy as np
import pytest
import reference
from helpers import assert_within, epsilon
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_properties import (
    TINY,
    assert_gradient,
    cases,
    flags,
    floats,
    formats,
    in_range,
    losses_and_gradient,
    loud,
    nonzero,
    rounded,
    shapes,
    without_infinite_terms,
)

from softmax_jax import SparseLabels, kl_divergence, label_statistics

pytestmark = pytest.mark.nan  # hypothesis draws it


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
