"""The functions below the waist by themselves, against NumPy on rows that show what each is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from softmax_jax import _sparse_labels
from softmax_jax._adjustment import Adjustment, adjust, row_shift, z_at_of_all
from softmax_jax._classes import Classes
from softmax_jax._fold_cpu import dense_sums, moment_of_others, sum_of_others, top_class
from softmax_jax._labels import Dense
from softmax_jax._masses import existing_classes
from softmax_jax._sparse_labels import Sparse, few, spread_evenly, sums_of_few
from softmax_jax._sums import Tokens

INF, NONE = np.inf, Adjustment(None, None, None)
merged = jax.jit(_sparse_labels.merged, static_argnums=3)
largest = jax.jit(lambda z, adjustment, axis: row_shift(adjust(z, adjustment), axis), static_argnums=2)
top = jax.jit(top_class, static_argnums=3)
sum_others, moment_others = (jax.jit(f, static_argnums=4) for f in (sum_of_others, moment_of_others))
dense_of, number_of = (
    jax.jit(Sparse.probabilities, static_argnums=(2, 3)),
    jax.jit(existing_classes, static_argnums=(1, 2, 3)),
)
spread = jax.jit(spread_evenly, static_argnums=(3, 4))
sparse_rest, few_of_shard = jax.jit(sums_of_few, static_argnums=4), jax.jit(few, static_argnums=1)
dense_of_all = jax.jit(dense_sums, static_argnums=3)


def top_of(z, adjustment=NONE, axis=-1):
    z = jnp.asarray(z)
    axis = axis % z.ndim
    return np.asarray(top(z, largest(z, adjustment, axis), adjustment, Classes(axis)))


@pytest.mark.nan
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_top_class_is_the_last_of_the_largest(dtype):
    """Also where the largest is 0, or the format's largest or lowest number; none of a row of NaN or -inf."""
    info = jnp.finfo(dtype)
    big, low, small = float(info.max), float(info.min), max(1e-20, float(info.smallest_subnormal))
    rows = {
        (1, 3, 3, 2): 2,
        (0, -1, 0, -2): 2,
        (0, -small, -1, -INF): 0,
        (-5, -3, -4, -9): 1,
        (big, low, 0, -big): 0,
        (low, -INF, low, -INF): 2,
        (-INF, 7, -INF, -INF): 1,
        (-INF, -INF, -INF, -INF): 4,
        (np.nan, 1, 2, 0): 4,
        (1, 1 + 2 * float(info.eps), 1, 1): 1,
        (-1, -1 - 2 * float(info.eps), -1.5, -2): 0,
        (100, 101, 101, 100): 2,
    }
    z, want = np.array(list(rows)).astype(dtype), np.array([*rows.values()])
    np.testing.assert_array_equal(top_of(z), want)
    np.testing.assert_array_equal(top_of(z.T, axis=0), want)
    np.testing.assert_array_equal(top_of(np.tile(z, (100, 1))), np.tile(want, 100))  # class by class
    where = np.arange(4) != 2
    np.testing.assert_array_equal(
        top_of(z, Adjustment(jnp.asarray(where)[None], None, None)), [1, 0, 0, 1, 0, 0, 1, 4, 4, 1, 0, 1]
    )


def test_top_class_where_rounding_leaves_no_maximum(rng):
    """Of a maximum that another rounding made larger or smaller, one within a few roundings of it."""
    z = np.float32(100 * rng.normal(size=(50, 33)))
    m = z.max(-1)
    for off in (m, np.nextafter(m, np.float32(INF)), np.nextafter(m, np.float32(-INF))):
        at = np.asarray(top(jnp.asarray(z), jnp.asarray(off), NONE, Classes(1)))
        assert np.all(m - z[np.arange(50), at] <= 8 * np.spacing(np.abs(m)))


def test_sums_of_all_but_the_pivot(rng):
    """-inf adds nothing to either; the pivot may be any class or none."""
    z = np.float32(3 * rng.normal(size=(5, 9)))
    z[:, 4], pivot, m = -INF, np.int32([0, 8, 4, -1, 9]), z.max(-1)
    others = np.exp(np.float64(z) - m[:, None]) * (np.arange(9) != pivot[:, None])
    gap = np.where(np.isinf(z), 0, m[:, None] - np.float64(z))
    operands = jnp.asarray(z), jnp.asarray(m), jnp.asarray(pivot), NONE, 1
    np.testing.assert_allclose(sum_others(*operands), others.sum(-1), rtol=1e-6)
    np.testing.assert_allclose(moment_others(*operands), (others * gap).sum(-1), rtol=1e-6)


def test_z_of_a_class_of_all(rng):
    """0 for an id that no class has."""
    z = np.float32(rng.normal(size=(5, 3)) + 5)
    got = z_at_of_all(jnp.int32([0, 2, 1, -1, 3]), jnp.asarray(z), NONE, Classes(1))
    np.testing.assert_array_equal(got, [z[0, 0], z[1, 2], z[2, 1], 0, 0])


def in_one_form(ids, probs):
    """{id: probability} of each row, of 6 classes."""
    ids, probs = merged(jnp.int32(ids), jnp.float32(probs), None, 6)
    assert np.all(np.asarray(probs)[np.asarray(ids) == -1] == 0)
    found = [[(int(i), float(p)) for i, p in zip(*row, strict=True) if i != -1] for row in zip(ids, probs, strict=True)]
    assert all(len(dict(row)) == len(row) for row in found)  # each id once
    return [{i: pytest.approx(p) for i, p in row} for row in found]


@pytest.mark.nan
def test_merged_entries():
    """Those of one class add up, wherever they stand; one of probability 0 is left out, whatever its id. An id that no
    class has makes its row NaN, unless that is not used."""
    ids = [[3, 1, 3, 0, 3], [5, 5, 5, 5, 5], [-1, 9, 0, -7, 2], [4, 3, 2, 1, 0]]
    probs = [[0.1, 0.2, 0.3, 0.4, 0.5], [1, 2, 3, 4, 5], [0, 0, 0.5, 0, 0.25], [0.5, 0, 0.25, 0, 1]]
    want = [{0: 0.4, 1: 0.2, 3: 0.9}, {5: 15}, {0: 0.5, 2: 0.25}, {4: 0.5, 2: 0.25, 0: 1}]
    assert in_one_form(ids, probs) == want
    assert in_one_form([[2], [0]], [[0.5], [0]]) == [{2: 0.5}, {}]
    assert in_one_form([[0, 0], [1, 2]], [[0.5, 0.25], [-0.5, 1]]) == [{0: 0.75}, {1: -0.5, 2: 1}]
    for bad in (-1, 6):
        labels = jnp.int32([[0, bad], [0, 5]]), jnp.full((2, 2), 0.5, jnp.float32)
        for unused, row in ((None, True), ([False, False], True), ([True, False], False), ([False, True], True)):
            _, got = merged(*labels, None if unused is None else jnp.array(unused), 6)
            np.testing.assert_array_equal(np.isnan(got).any(-1), [row, False])
        _, boxed = merged(*(a[None] for a in labels), None, 6)
        np.testing.assert_array_equal(np.isnan(boxed).any(-1), [[True, False]])
    flat = merged(jnp.int32(ids), jnp.float32(probs), None, 6)
    for shape in ((2, 2, 5), (4, 1, 5)):
        boxed = merged(jnp.int32(ids).reshape(shape), jnp.float32(probs).reshape(shape), None, 6)
        for got, want in zip(boxed, flat, strict=True):
            np.testing.assert_array_equal(got.reshape(4, 5), want)
    _, one = merged(jnp.int32([[0], [6]]), jnp.float32([[1], [1]]), None, 6)
    np.testing.assert_array_equal(np.isnan(one), [[False], [True]])


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_others_are_spread_over_the_classes_without_an_entry(hidden, axis):
    """Of those that exist, be it one; where all have an entry, `others` is left out."""
    ids = np.int32([[0, 2], [5, -1], [1, 0], [3, 4]])
    probs = np.float32([[0.5, 0.25], [0.4, 0], [0.2, 0.3], [0.1, 0.2]])
    others, where = np.float32([0.3, 0.6, 0.4, 0.7]), np.ones((4, 6), bool)
    if hidden:
        where[0, 1], where[1, 5], where[2], where[3] = False, False, np.arange(6) < 2, np.arange(6) > 2
    each = np.float32([0.3 / 3, 0.6 / 5, 0, 0.7] if hidden else [0.3 / 4, 0.6 / 5, 0.4 / 4, 0.7 / 4])
    want = reference.dense_labels(ids, probs, others, where)
    turn = lambda a: jnp.asarray(a if axis == 1 else a.T)  # noqa: E731
    labels = Sparse(turn(ids), turn(probs), jnp.asarray(others))
    exists = turn(where) if hidden else None
    np.testing.assert_allclose(dense_of(labels, exists, 6, Classes(axis)), turn(want), rtol=1e-6)

    number = number_of(exists, 6, Classes(axis), jnp.float32)
    np.testing.assert_array_equal(np.broadcast_to(number, 4), where.sum(-1))
    without, share = spread(labels, exists, jnp.broadcast_to(number, 4), 6, Classes(axis))
    assert without.others is None
    np.testing.assert_allclose(share, each, rtol=1e-6)
    np.testing.assert_allclose(without.probs, turn(probs - each[:, None]), atol=1e-7)


def test_classes_are_counted_by_a_mask_that_they_share():
    where = jnp.array([[True], [False]])
    np.testing.assert_array_equal(existing_classes(where, 6, Classes(1), jnp.float32), [6, 0])


@pytest.mark.nan
@pytest.mark.parametrize("weighted", [False, True])
def test_masses_and_sums_of_dense_and_of_few_labels(rng, weighted):
    """Around any pivot; a target of 0 wins over z = -inf; a hidden class counts nowhere, whatever its
    label; a shard has its part."""
    z = np.float32(rng.normal(size=(4, 6)))
    z[:, 3], where = -INF, np.ones((4, 6), bool)
    where[1, 5] = where[3, 1] = False
    m = z.max(-1)
    ids = np.int32([[0, 4], [5, 1], [2, -1], [1, 2]])
    probs = np.float32([[0.5, 0.25], [0.4, 0.1], [0.2, 0], [0.7, 0.6]])
    weights = np.float32(rng.uniform(0.5, 2, 6)) if weighted else np.ones(6, np.float32)
    t, pivot = np.float32(reference.dense_labels(ids, probs, None, where)), np.int32([0, 1, 5, 2])
    labels = np.where(where, t, np.nan)
    at = np.arange(6) == pivot[:, None]
    gap = np.where(t == 0, 0, np.float64(z) - m[:, None])
    mass, rest = (t * weights * at).sum(-1), t * weights * ~at
    want = mass, rest.sum(-1), (rest * gap).sum(-1)

    c, exists = jnp.asarray(weights)[None] if weighted else None, jnp.asarray(where)
    adjustment = Adjustment(exists, None, None)
    logits, place, classes = jnp.asarray(z), jnp.asarray(pivot), Classes(1)
    tokens = Tokens(logits, Dense(jnp.asarray(labels)), c, adjustment)
    dense = dense_of_all(tokens, jnp.asarray(m), place, classes)
    for got, truth in zip(dense, want, strict=True):
        np.testing.assert_allclose(got, truth, rtol=1e-6, atol=1e-7)
    mass_at = lambda place: np.asarray(dense_of_all(tokens, jnp.asarray(m), place, classes)[0])  # noqa: E731
    assert mass_at(jnp.full(4, 5, jnp.int32))[1] == 0
    assert not np.any(mass_at(place + 6)) and not np.any(mass_at(place - 6))

    total = np.zeros((3, 4))
    for first, size in ((0, 2), (2, 4)):  # two shards
        here = slice(first, first + size)
        sparse = Sparse(jnp.asarray(ids - first), jnp.asarray(probs))
        shard = Tokens(logits[:, here], sparse, None if c is None else c[:, here], Adjustment(exists[:, here]))
        found = few_of_shard(shard, classes)
        total += np.stack(sparse_rest(found.logits - m[:, None], sparse.probs, found, place - first, classes))
    np.testing.assert_allclose(total, want, rtol=1e-6, atol=1e-7)


def test_the_references_dense_labels_are_those(rng):
    ids = rng.integers(0, 6, (5, 3)).astype(np.int32)
    probs = rng.uniform(0.1, 1, (5, 3)).astype(np.float32)
    labels = Sparse(*merged(jnp.asarray(ids), jnp.asarray(probs), None, 6), jnp.full(5, 0.2, jnp.float32))
    want = reference.dense_labels(ids, probs, np.full(5, 0.2), np.ones((5, 6), bool))
    np.testing.assert_allclose(dense_of(labels, None, 6, Classes(1)), want, rtol=1e-6)
