"""Sums in blocks of tokens: the same truth in blocks of any shape, every option, any kind of labels, mapped or not.

(`pytest --block 150` runs any other test in blocks so small that every loop turns.) Last, more than 2**31 logits, where
32-bit indices wrap (`pytest -m slow`, 13 GiB), and more than 2**24 classes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import ALONE, assert_within, check_against_reference, epsilon, few_of, random_case
from jax.sharding import PartitionSpec as P
from meshes import assert_equal, collectives, mesh_of, problem, truth, under_jit

from softmax_jax import SparseLabels, cross_entropy, kl_divergence, label_statistics, log_softmax
from softmax_jax._sums import blocks

pytestmark = pytest.mark.optimized

MANY, FEW = 1024, 16
SHAPES = [(MANY + 7, 6), (2, MANY // 2, FEW), (MANY, 1)]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]

shapes = pytest.mark.parametrize("shape", few_of(SHAPES), ids=str)
dtypes = pytest.mark.parametrize("dtype", few_of(DTYPES), ids=lambda d: d.__name__)
both = pytest.mark.parametrize("dense", few_of([False, True]), ids=["integer", "dense"])


def _unusual(logits):
    """Ties, -inf, and rows far apart, among the first."""
    logits[..., :2] = np.where(np.arange(logits.shape[-2])[:, None] % 3 == 0, logits[..., :1], logits[..., :2])
    logits[..., ::5, 0] = -np.inf
    logits[..., 1::7, :] += logits.dtype.type(200)
    return logits


@pytest.mark.diagonal
@shapes
@dtypes
@both
def test_every_option_at_once(device, rng, shape, dtype, dense):
    names = [name for name in ALONE if not (dense and name == "ignore_index")]
    case = random_case(rng, shape, dtype=dtype, dense=dense, names=names)
    check_against_reference(jax.jit, rng, *case[:2], {**case[2], "reduction": "none"}, k=16)


@both
def test_no_option_unusual_rows_and_another_axis(device, rng, dense):
    logits, labels, _ = random_case(rng, SHAPES[0], dense=dense)
    logits = _unusual(logits) if not dense else logits
    if not dense:
        labels = np.where(np.isneginf(logits[:, 0]) & (labels == 0), 1, labels)
    check_against_reference(jax.jit, rng, logits, labels, {"reduction": "none"})
    labels = labels.T if dense else labels
    check_against_reference(jax.jit, rng, np.ascontiguousarray(logits.T), labels, {"axis": 0, "reduction": "none"})


@jax.jit
def losses_and_gradient(z, labels, cotangent):
    losses, pull = jax.vjp(lambda z: cross_entropy(z, labels, reduction="none"), z)
    return losses, pull(cotangent)[0]


@pytest.mark.nan
@pytest.mark.parametrize(
    "shape", few_of([(64, 64), (MANY + 7, 6), (8, 65536), (MANY, 17), (8, 1000)], thorough=2), ids=str
)
def test_rows_that_have_no_loss(device, rng, shape):
    """NaN and +inf anywhere in a row make it NaN, though XLA's row maximum on the CPU may drop them. Its neighbours,
    and those of a label of no class and of a row of -inf, are as they were."""
    z = rng.normal(size=shape).astype(np.float32)
    z[0, -1], z[1, 2], z[3, 5], z[4, 0], z[5] = np.nan, np.nan, np.inf, np.inf, -np.inf
    labels = rng.integers(0, shape[1], len(z))
    labels[6] = -1
    targets = np.zeros(shape, np.float32)
    targets[np.arange(len(z)), labels] = 1
    sparse = SparseLabels(labels[:, None], np.ones((len(z), 1), np.float32))
    cotangent = rng.normal(size=len(z)).astype(np.float32)
    for given in (labels, targets, sparse):
        broken = [0, 1, 3, 4, 5] + [6] * (given is not targets)
        loss, grad = map(np.asarray, losses_and_gradient(z, given, cotangent))
        assert np.flatnonzero(np.isnan(loss)).tolist() == broken and np.isnan(grad).any(-1)[broken].all()
        good = np.setdiff1d(np.arange(len(z)), broken)
        want = reference.cross_entropy(z[good], targets[good], reduction="none", cotangent=np.float64(cotangent[good]))
        assert_within(loss[good], want.loss, want.loss_condition, 8)
        assert_within(grad[good], want.grad, want.grad_condition, 8)
    log_p, found = jax.jit(lambda z, labels: (log_softmax(z), label_statistics(z, labels)))(z, labels)
    assert np.flatnonzero(np.isnan(log_p).all(-1)).tolist() == [0, 1, 3, 4, 5]
    assert all(np.isnan(value)[[0, 1, 3, 4, 5]].all() for value in found[:3])


@pytest.mark.cpu_compiler
@pytest.mark.parametrize("classes", few_of([1_800_000, 2**21]))
def test_the_top_of_millions_of_classes(rng, classes):
    z = np.zeros((3, classes), np.float32)
    labels = np.array([1, classes // 2 + 1, classes - 1])
    z[np.arange(3), labels] = 60
    cotangent = rng.normal(size=3).astype(np.float32)
    want = reference.cross_entropy(z, labels, reduction="none", cotangent=np.float64(cotangent))

    @jax.jit
    def of(z):
        targets = jax.nn.one_hot(labels, classes)
        loss, pull = jax.vjp(lambda z: cross_entropy(z, targets, reduction="none"), z)
        return loss, -log_softmax(z)[np.arange(3), labels], pull(cotangent)[0][np.arange(3), labels]

    for got, truth_of in zip(of(z), (want.loss, want.loss, want.grad[np.arange(3), labels]), strict=True):
        np.testing.assert_allclose(got, truth_of, rtol=1e-5)


@dtypes
def test_log_softmax_and_its_pullback(device, rng, dtype):
    x = _unusual((3 * rng.normal(size=SHAPES[0])).astype(dtype))
    g = np.asarray(rng.normal(size=x.shape), dtype)
    y, dx = jax.jit(lambda x, g: (log_softmax(x), jax.vjp(log_softmax, x)[1](g)[0]))(x, g)
    want, p = (f(np.float64(x)) for f in (reference.log_softmax, reference.softmax))
    total = np.float64(g).sum(-1, keepdims=True)
    size = 1 + np.abs(np.where(np.isinf(x), 0, np.float64(x))) + np.max(np.float64(x), -1, keepdims=True)
    assert_within(y, want, size, 8, dtype)
    condition = np.abs(np.float64(g)) + p * size * np.abs(np.float64(g)).sum(-1, keepdims=True)
    assert_within(dx, np.float64(g) - p * total, condition, 8, dtype)


@pytest.mark.thorough
def test_sparse_labels_and_statistics(device, rng):
    z = _unusual((3 * rng.normal(size=SHAPES[0])).astype(np.float32))
    ids = rng.permuted(np.tile(np.arange(1, 6), (len(z), 1)), axis=-1)[:, :3]
    probs = rng.gamma(0.5, size=ids.shape).astype(np.float32)
    cotangent = rng.normal(size=len(z)).astype(np.float32)
    loss, grad = losses_and_gradient(z, SparseLabels(ids, probs), cotangent)
    dense = reference.dense_labels(ids, probs, None, np.ones(z.shape, bool))
    want = reference.cross_entropy(z, dense, reduction="none", cotangent=np.float64(cotangent))
    assert_within(loss, want.loss, want.loss_condition, 8)
    assert_within(grad, want.grad, want.grad_condition, 8)

    labels, cotangents = ids[:, 0], tuple(rng.normal(size=(3, len(z))).astype(np.float32))

    @jax.jit
    def of_statistics(z, cotangents):
        floats_of = lambda z: (lambda found: (found[:3], found))(label_statistics(z, labels))  # noqa: E731
        _, pull, found = jax.vjp(floats_of, z, has_aux=True)
        return found, pull(cotangents)[0]

    found, dz = of_statistics(z, cotangents)
    want = reference.label_statistics(z, labels, cotangents)
    assert_within(dz, want.grad, want.grad_condition, 16)
    for got, truth_of, condition in zip(found[:3], want.values, want.conditions, strict=False):
        assert_within(got, truth_of, condition, 16)
    np.testing.assert_array_equal(found.correct, want.values[3])
    np.testing.assert_array_equal(found.rank, want.values[4])


@pytest.mark.thorough
@pytest.mark.unoptimized
@pytest.mark.parametrize("beta", few_of([0.25, 0.0, 1.0]))
def test_divergences(device, rng, beta):
    teacher, student = (3 * rng.normal(size=(2, MANY + 7, 3))).astype(np.float32)
    cotangent = rng.normal(size=len(student)).astype(np.float32)

    @jax.jit
    def both(a, b):
        value, pull = jax.vjp(lambda a, b: kl_divergence(a, teacher_logits=b, beta=beta, reduction="none"), a, b)
        return value, pull(jnp.asarray(cotangent))

    value, grads = both(student, teacher)
    want = reference.divergence(teacher, student, beta)
    assert_within(value, want.loss, want.loss_condition, 16)
    for got, grad, condition in zip(grads[::-1], want.grads, want.grad_conditions, strict=True):
        factor = np.float64(cotangent)[:, None]
        assert_within(got, grad * factor, np.abs(factor) * condition, 16)


@pytest.mark.compiled
@pytest.mark.unoptimized
@pytest.mark.cpu_compiler
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the older compiler fuses less")
@dtypes
@both
def test_nothing_of_the_logits_size_is_made(dtype, dense):
    """On the CPU: six numbers a token at the most, twelve with dense labels, and three arrays of a block."""
    tokens = 2**20
    logits = jax.ShapeDtypeStruct((tokens, 10), dtype)
    labels = jax.ShapeDtypeStruct((tokens, 10) if dense else (tokens,), jnp.float32 if dense else jnp.int32)
    memory = jax.jit(jax.value_and_grad(cross_entropy)).lower(logits, labels).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= (12 if dense else 6) * 4 * tokens + 3 * 4 * blocks.BLOCK


@pytest.mark.devices
@pytest.mark.diagonal
@pytest.mark.compiled
@pytest.mark.unoptimized
@pytest.mark.parametrize("kind", ["automatic", "explicit"])
@pytest.mark.parametrize("layout", [(P("data"), None), (P(), "model")], ids=["batch", "classes"])
@both
def test_over_devices(rng, kind, layout, dense):
    """A sharded batch stays where it is. (Few classes that are sharded automatically are brought together.)"""
    asked = problem(rng, (8 * MANY, 16), dense)
    mesh, specs = mesh_of(kind), asked.specs(*layout)
    got, program = under_jit(asked, mesh, specs, 1.7)
    assert_equal(got, truth(asked, 1.7))
    if layout[1] is None or kind == "explicit":
        assert {found.op for found in collectives(program)} <= {"all-reduce"}


def test_the_same_as_rows_of_a_small_batch(rng):
    """Which are summed as a whole: up to the order of the sum, and so to the roundings of sixteen terms."""
    z = (5 * rng.normal(size=(MANY, FEW))).astype(np.float32)
    labels = rng.integers(0, FEW, MANY)
    losses = cross_entropy(z, labels, reduction="none")
    part = cross_entropy(z[: MANY - 1], labels[:-1], reduction="none")
    np.testing.assert_allclose(losses[:-1], part, rtol=FEW * epsilon(jnp.float32))


@pytest.mark.parametrize(
    ("shape", "axis", "block"),
    [
        ((5, 7, 11), -1, (1, 7, 11)),
        ((5, 40, 11), -1, (1, 8, 11)),  # parts as equal as may be, the last of which overlaps
        ((7, 2, 2, 11), -1, (2, 2, 2, 11)),
        ((11, 5, 43), -3, (11, 1, 9)),
        ((3, 11, 5, 4), -3, (1, 11, 2, 4)),
        ((5, 300), -1, (1, 300)),  # more classes than a block holds
        ((300,), -1, (300,)),
        ((2, 0, 11), -1, (2, 0, 11)),
        ((4, 0), -1, (4, 0)),
    ],
)
def test_a_block_is_whole_along_the_classes(monkeypatch, shape, axis, block):
    monkeypatch.setattr(blocks, "BLOCK", 100)
    assert blocks.block_shape(shape, axis) == block


@pytest.fixture
def small(monkeypatch):
    """Blocks of 40 logits: JAX keeps programs by the function alone, it forgets them before and after."""
    jax.clear_caches()
    monkeypatch.setattr(blocks, "BLOCK", 40)
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("axis", [-1, 0, 1])
@pytest.mark.parametrize("names", few_of([ALONE, ()]), ids=["every option", "none"])
@both
def test_blocks_of_any_axis(rng, axis, names, dense):
    """Also one that overlaps the one before, whose tokens are then summed twice and told once."""
    shape = {-1: (3, 13, 7), 0: (7, 3, 13), 1: (3, 7, 2, 13)}[axis]
    names = [name for name in names if not (dense and name == "ignore_index")]
    case = random_case(rng, shape, axis=axis, dense=dense, names=names)
    check_against_reference(jax.jit, rng, *case[:2], {**case[2], "reduction": "none"})


OPERANDS = ["z", "y", "t", "where", "cap", "scale", "class_weights"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("some", few_of([OPERANDS, *([name] for name in OPERANDS)]), ids="+".join)
def test_a_mapped_axis_is_one_of_the_blocks(rng, some):
    """Every operand mapped alone and all together, once and twice: value and gradient of each example by itself."""
    z, t = rng.normal(size=(2, 2, 3, 9, 7)).astype(np.float32)
    operands = {
        "z": 3 * z,
        "y": rng.integers(0, 7, (2, 3, 9)),
        "t": np.abs(t),
        "where": rng.random((2, 3, 9, 7)) < 0.8,
        "cap": rng.uniform(2, 5, (2, 3)).astype(np.float32),
        "scale": rng.uniform(0.5, 2, (2, 3)).astype(np.float32),
        "class_weights": rng.uniform(0.5, 2, (2, 3, 7)).astype(np.float32),
    }

    def each(operands):
        z, y, t, where, cap, scale, c = (operands[name] for name in OPERANDS)
        more = {"where": where, "softcap": cap, "logit_scale": scale, "reduction": "none"}
        told = label_statistics(z, y, where=where, softcap=cap, logit_scale=scale)
        ids = cross_entropy(z, y, class_weights=c, **more)
        divergence = kl_divergence(z, teacher_logits=t, where=where, softcap=cap, temperature=scale, reduction="none")
        told = jnp.where(jnp.isfinite(told.log_prob), told.entropy + told.rank.astype(jnp.float32), 0)
        return jnp.where(jnp.isfinite(ids), ids, 0) + cross_entropy(z, t, label_smoothing=0.1, **more), told, divergence

    def both(operands):
        value, pull = jax.vjp(lambda z: each({**operands, "z": z}), operands["z"])
        return value, pull(tuple(jnp.cos(jnp.arange(v.size)).reshape(v.shape) for v in value))[0]

    mapped = {name: 0 if name in some else None for name in OPERANDS}
    once = {name: operands[name][0] if name in some else operands[name][0, 0] for name in OPERANDS}
    twice = {name: operands[name] if name in some else operands[name][0, 0] for name in OPERANDS}
    of_each = jax.jit(both)
    for got, of in (
        (jax.jit(jax.vmap(both, (mapped,)))(once), [(i,) for i in range(3)]),
        (jax.jit(jax.vmap(jax.vmap(both, (mapped,)), (mapped,)))(twice), [(i, j) for i in range(2) for j in range(3)]),
    ):
        for index in of:
            given = twice if len(index) == 2 else once
            alone = of_each({name: a[index] if name in some else a for name, a in given.items()})
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(alone), strict=True):
                np.testing.assert_allclose(a[index], b, rtol=2e-5, atol=2e-6)


@pytest.mark.compiled
@pytest.mark.cpu_compiler
@pytest.mark.parametrize("f", [cross_entropy, lambda z, y: tuple(label_statistics(z, y))], ids=["loss", "statistics"])
def test_rows_that_are_mapped_one_by_one_are_blocks_all_the_same(f):
    """Failure 34: `vmap` shows a function one example, which is no block."""
    z, y = jax.ShapeDtypeStruct((4096, 32000), jnp.float32), jax.ShapeDtypeStruct((4096,), jnp.int32)
    program = jax.jit(jax.vmap(f)).lower(z, y).compile()
    assert program.memory_analysis().temp_size_in_bytes < 0.1 * 4 * 4096 * 32000


ROWS, CLASSES = 65537, 32768  # the last row begins at entry 2**31


@pytest.mark.slow
@pytest.mark.parametrize("rows", [slice(-3, None), slice(0, 3)], ids=["beyond 2**31", "before"])
def test_beyond_two_to_the_31_logits(rng, rows):
    some = (3 * rng.normal(size=(3, CLASSES))).astype(jnp.bfloat16)
    labels, cotangents = rng.integers(0, CLASSES, ROWS).astype(np.int32), rng.normal(size=ROWS).astype(np.float32)

    @jax.jit
    def at(some, labels, cotangents):
        logits = jnp.zeros((ROWS, CLASSES), jnp.bfloat16).at[rows].set(some)
        losses, pull = jax.vjp(lambda z: cross_entropy(z, labels, reduction="none"), logits)
        return losses, pull(cotangents)[0][rows]

    losses, gradient = at(some, labels, cotangents)
    want = reference.cross_entropy(some, labels[rows], reduction="none", cotangent=np.float64(cotangents[rows]))
    assert_within(losses[rows], want.loss, want.loss_condition, 8)
    assert_within(gradient, want.grad, want.grad_condition, 8, jnp.bfloat16)
    others = np.delete(np.asarray(losses), np.arange(ROWS)[rows])
    np.testing.assert_allclose(others, np.log(CLASSES), rtol=1e-6)


@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
@pytest.mark.parametrize("classes", [2**24 + 4, 2**24 + 43], ids=["blocks", "prime"])
def test_more_classes_than_float32_has_integers(dense, classes):
    """Beyond 2²⁴ an id is no float32 any more: the label's neighbours must not be taken for it."""
    label = 2**24 + 1  # odd: in float32 it would be one of its neighbours
    logits = np.full((1, classes), -200, np.float32)  # all others are 0 beside these three
    logits[0, label - 1 : label + 2] = 0.5, 1.0, 0.25
    labels = np.array([label], np.int32)
    if dense:
        labels = np.zeros_like(logits)
        labels[0, label] = 1
    loss, gradient = jax.jit(jax.value_and_grad(cross_entropy))(logits, labels)
    odds = np.exp([-0.5, 0, -0.75])
    np.testing.assert_allclose(loss, np.log(odds.sum()), rtol=1e-6)
    np.testing.assert_allclose(gradient[0, label - 1 : label + 2], odds / odds.sum() - [0, 1, 0], rtol=1e-6)
