"""SparseLabels and label_statistics against float64 on the inputs of test_properties.py, as often as there, under the
same budgets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import assert_within
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_properties import (
    assert_gradient,
    cases,
    flags,
    floats,
    formats,
    in_range,
    losses_and_gradient,
    nonzero,
    rounded,
    shapes,
    without_infinite_terms,
)

from softmax_jax import SparseLabels, label_statistics

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
    losses, gradient = losses_and_gradient(logits, labels, options, cotangents)
    assert_within(losses, in_range(want.loss), want.loss_condition, 16, err_msg="loss")
    assert_gradient(np.asarray(gradient, np.float32), want, meant, cotangents, logits.dtype)


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
    np.testing.assert_array_equal(correct, want.values[3] & ~bad & ~empty)
    np.testing.assert_array_equal(rank, np.where(empty, 0, np.where(bad, -1, want.values[4])))
    dead = (bad | empty)[..., None]
    truth, condition = (np.where(dead, 0, a) for a in (in_range(want.grad), want.grad_condition))
    assert_within(np.where(dead, 0, np.float32(gradient)), truth, condition, 16, dtype, "gradient")
