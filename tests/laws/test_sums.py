"""The functions below the waist by themselves, against NumPy on rows that show what each is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from softmax_jax._devices import Classes
from softmax_jax._inputs.labels import Dense, Ids, Sparse, merge_entries
from softmax_jax._inputs.options import Adjustment, adjusted_at_global
from softmax_jax._sums import blocks
from softmax_jax._sums.targets import dense_probabilities, share_of_others, target_sums
from softmax_jax._sums.waist import ExtraSums, Tokens

INF, NONE = np.inf, Adjustment(None, None, None)
merged = jax.jit(merge_entries, static_argnums=3)
block = jax.jit(blocks.block_sums, static_argnames="axis")
num_existing = jax.jit(blocks.num_existing, static_argnums=(1, 2, 3))
dense_of, share_of = (jax.jit(f, static_argnums=(3, 4)) for f in (dense_probabilities, share_of_others))
sparse_sums = jax.jit(target_sums)


def tokens_of(logits, adjustment=NONE, labels=None, axis=1, **more):
    return Tokens(logits, labels, adjustment, classes=Classes(axis), **more)


def along(numbers):
    return jnp.asarray(numbers)[:, None]


@pytest.mark.nan
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_top_class_is_the_first_of_the_largest(dtype):
    """Also where the largest is 0, or the format's largest or lowest number, and among classes that are there."""
    info = jnp.finfo(dtype)
    big, low, small = float(info.max), float(info.min), max(1e-20, float(info.smallest_subnormal))
    rows = {
        (1, 3, 3, 2): 1,
        (0, -1, 0, -2): 0,
        (0, -small, -1, -INF): 0,
        (-5, -3, -4, -9): 1,
        (big, low, 0, -big): 0,
        (low, -INF, low, -INF): 0,
        (-INF, 7, -INF, -INF): 1,
        (1, 1 + 2 * float(info.eps), 1, 1): 1,
        (-1, -1 - 2 * float(info.eps), -1.5, -2): 0,
        (100, 101, 101, 100): 1,
    }
    z, want = jnp.asarray(np.array(list(rows)).astype(dtype)), np.array([*rows.values()])
    for array, axis in ((z, -1), (z.T, -2)):
        found = block(tokens_of(array), axis=axis)
        np.testing.assert_array_equal(found.pivot.ravel(), want)
        np.testing.assert_array_equal(found.row_max.ravel(), np.float32(z.max(-1)))
    where = Adjustment(jnp.arange(4)[None] != 1)
    hidden = block(tokens_of(z, where), axis=-1)
    np.testing.assert_array_equal(hidden.pivot.ravel(), [2, 0, 0, 2, 0, 0, 0, 0, 0, 2])


@pytest.mark.nan
def test_a_row_that_has_no_sums_says_so():
    """m is -inf in one of -inf alone, which adds nothing; rest is NaN beside a NaN or +inf, whatever the pivot."""
    z = jnp.array([[-INF] * 3, [0, np.nan, 1], [1, INF, 0], [np.nan] * 3])
    for label in (None, along([0, 2, 0, 1]), along([1, 1, 1, 3])):
        found = block(tokens_of(z, labels=None if label is None else Ids(label)), axis=-1)
        assert found.row_max[0] == -INF and found.rest[0] == 0
        taken = jnp.zeros(3) if label is None or label[0] == 0 else found.label_logit[1:, 0]
        assert np.all(np.isnan(found.rest[1:, 0] + found.row_max[1:, 0] - found.row_max[1:, 0] + taken))


def test_sums_of_all_but_the_label(rng):
    """-inf adds nothing; the label may be any class or none, and is no part of the rest; its logit is told as it
    came."""
    z = np.float32(3 * rng.normal(size=(5, 9)))
    z[:, 4], label = -INF, np.int32([0, 8, 4, -1, 9])
    here = np.arange(9) == label[:, None]
    z[0, 0] = 50  # also the largest
    others = np.exp(np.float64(z) - z.max(-1, keepdims=True)) * ~here
    found = block(tokens_of(jnp.asarray(z), Adjustment(softcap=jnp.float32(1e6)), Ids(along(label))), axis=-1)
    np.testing.assert_allclose(found.rest.ravel(), others.sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(found.label_logit.ravel(), np.where(here, z, 0).sum(-1))


def test_sums_around_the_top(rng):
    """The entropy's moment, how many are above a class, and what is spread evenly."""
    z = np.float32(3 * rng.normal(size=(5, 9)))
    z[:, 4], label = -INF, np.int32([0, 8, 4, 2, 7])
    z[1, 8], z[2, 3] = z[1].max() + 1, z[2].max()
    c, own = np.float32(rng.uniform(0.5, 2, 9)), z[np.arange(5), label]
    c[4], m = 0, z.max(-1, keepdims=True)
    down, others = np.float64(z) - m, np.arange(9) != np.argmax(z, -1)[:, None]
    labels, extra = Ids(along(label), along(own)), ExtraSums(even=True, statistics=True)
    tokens = tokens_of(jnp.asarray(z), NONE, labels, class_weights=jnp.asarray(c)[None], extra=extra)
    found = block(tokens, axis=-1)
    np.testing.assert_allclose(found.rest.ravel(), (np.exp(down) * others).sum(-1), rtol=1e-6)
    gap = np.where(np.isinf(z), 0, -down)
    np.testing.assert_allclose(found.moment.ravel(), (np.exp(down) * gap).sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(found.above.ravel(), (z > own[:, None]).sum(-1))
    np.testing.assert_allclose(found.even_sum.ravel(), -(c * gap).sum(-1), rtol=1e-6)
    np.testing.assert_allclose(found.even_mass.ravel(), np.full(5, c.sum()), rtol=1e-6)


def test_z_of_a_class_of_all(rng):
    """0 for an id that no class has."""
    z = np.float32(rng.normal(size=(5, 3)) + 5)
    got = adjusted_at_global(jnp.int32([0, 2, 1, -1, 3]), jnp.asarray(z), NONE, Classes(1))
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
    number = num_existing(exists, 6, Classes(axis), jnp.float32)
    np.testing.assert_array_equal(np.broadcast_to(number, 4), where.sum(-1))
    number = jnp.broadcast_to(number, 4)
    np.testing.assert_allclose(dense_of(labels, exists, number, 6, Classes(axis)), turn(want), rtol=1e-6)
    np.testing.assert_allclose(share_of(labels, exists, number, 6, Classes(axis)), each, rtol=1e-6)


def test_classes_are_counted_by_a_mask_that_they_share():
    where = jnp.array([[True], [False]])
    np.testing.assert_array_equal(num_existing(where, 6, Classes(1), jnp.float32), [6, 0])


@pytest.mark.nan
@pytest.mark.parametrize("weighted", [False, True])
def test_masses_and_sums_of_dense_and_of_few_labels(rng, weighted):
    """A target of 0 wins over z = -inf; a hidden class counts nowhere, whatever its label; a shard has its part, around
    any pivot, and dense labels are summed around the top."""
    z = np.float32(rng.normal(size=(4, 6)))
    z[:, 3], where = -INF, np.ones((4, 6), bool)
    where[1, 5] = where[3, 1] = False
    m = np.where(where, z, -INF).max(-1)
    ids = np.int32([[0, 4], [5, 1], [2, -1], [1, 2]])
    probs = np.float32([[0.5, 0.25], [0.4, 0.1], [0.2, 0], [0.7, 0.6]])
    weights = np.float32(rng.uniform(0.5, 2, 6)) if weighted else np.ones(6, np.float32)
    t = np.float32(reference.dense_labels(ids, probs, None, where))
    gap = np.where(t == 0, 0, np.float64(z) - m[:, None])

    def around(pivot):
        at = np.arange(6) == pivot[:, None]
        rest = t * weights * ~at
        return (t * weights * at).sum(-1), rest.sum(-1), (rest * gap).sum(-1)

    c, exists = jnp.asarray(weights)[None] if weighted else None, jnp.asarray(where)
    adjustment, logits = Adjustment(exists, None, None), jnp.asarray(z)
    labels = Dense(jnp.asarray(np.where(where, t, np.nan)))
    found = block(tokens_of(logits, adjustment, labels, class_weights=c), axis=-1)
    dense = found.own_mass, found.other_mass, found.label_sum
    for got, truth in zip(dense, around(np.asarray(found.pivot).ravel()), strict=True):
        np.testing.assert_allclose(got.ravel(), truth, rtol=1e-6, atol=1e-7)

    total, pivot = np.zeros((3, 4)), np.int32([0, 1, 5, 2])
    for first, size in ((0, 2), (2, 4)):  # two shards
        here = slice(first, first + size)
        sparse = Sparse(jnp.asarray(ids - first), jnp.asarray(probs))
        of_classes = None if c is None else c[:, here]
        shard = tokens_of(logits[:, here], Adjustment(exists[:, here]), sparse, class_weights=of_classes)
        sums = sparse_sums(shard, jnp.asarray(m), jnp.asarray(pivot) - first)
        total += np.stack([sums[name] for name in ("own_mass", "other_mass", "label_sum")])
    np.testing.assert_allclose(total, around(pivot), rtol=1e-6, atol=1e-7)


def test_the_references_dense_labels_are_those(rng):
    ids = rng.integers(0, 6, (5, 3)).astype(np.int32)
    probs = rng.uniform(0.1, 1, (5, 3)).astype(np.float32)
    labels = Sparse(*merged(jnp.asarray(ids), jnp.asarray(probs), None, 6), jnp.full(5, 0.2, jnp.float32))
    want = reference.dense_labels(ids, probs, np.full(5, 0.2), np.ones((5, 6), bool))
    np.testing.assert_allclose(dense_of(labels, None, jnp.float32(6), 6, Classes(1)), want, rtol=1e-6)
