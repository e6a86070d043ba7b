"""SparseLabels: the dense labels that they mean, without the array."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import FLOATS, MARGINS, PROMISE, assert_within, at_margins, epsilon, few_of, relative_error, unoptimized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import collectives, mesh_of

from softmax_jax import SparseLabels, cross_entropy, linear_cross_entropy

ALL = {"where": True, "class_weights": True, **FLOATS}


def random_case(rng, batch, classes, k, others=False, names=(), dtype=jnp.float32):
    """(logits, SparseLabels with duplicates and padding, options)."""
    logits = np.array(3 * rng.normal(size=(*batch, classes))).astype(dtype)
    ids = rng.integers(0, classes, (*batch, k)).astype(np.int32)
    probs = rng.gamma(0.5, size=(*batch, k)).astype(np.float32)
    ids[..., 1] = ids[..., 2]
    ids[..., 3], probs[..., 3] = rng.choice([-1, 0, classes + 5], batch), 0
    labels = SparseLabels(ids, probs, rng.uniform(0.1, 0.5, batch).astype(np.float32) if others else None)
    options = {name: np.float32(value) for name, value in FLOATS.items() if name in names}
    if "where" in names:
        options["where"] = rng.random(logits.shape) < 0.7
    if "class_weights" in names:
        options["class_weights"] = rng.uniform(0.5, 2, classes).astype(np.float32)
    return logits, labels, options


def dense(labels, shape, where=None):
    return reference.dense_labels(*labels, np.broadcast_to(True if where is None else where, shape))


def in_float64(loss, *operands):
    """The gradients of the same library's loss on dense labels, whose truth is NumPy's, in float64."""
    with jax.enable_x64(True), unoptimized():
        wide = jax.tree.map(lambda a: np.float64(a) if a.dtype == np.float32 else a, operands)
        return jax.tree.map(np.asarray, jax.jit(jax.grad(loss, tuple(range(len(operands))), allow_int=True))(*wide))


@pytest.mark.diagonal
@pytest.mark.parametrize("dtype", few_of([jnp.float32, jnp.bfloat16, jnp.float16], 2), ids=lambda d: d.__name__)
@pytest.mark.parametrize("names", [(), tuple(ALL)], ids=["plain", "all"])
@pytest.mark.parametrize("others", [False, True], ids=["few", "spread"])
def test_they_are_the_dense_labels_that_they_mean(rng, others, names, dtype):
    """Duplicates add up, padding has no part; loss and gradient of the logits under random cotangents."""
    logits, labels, options = random_case(rng, (4, 5), 61, 7, others, names, dtype)
    cotangent = rng.normal(size=(4, 5)).astype(np.float32)
    t = dense(labels, logits.shape, options.get("where"))
    want = reference.cross_entropy(logits, t, reduction="none", cotangent=np.float64(cotangent), **options)
    loss = lambda z: cross_entropy(z, labels, reduction="none", **options)  # noqa: E731
    value, pull = jax.vjp(jax.jit(loss), logits)
    grad = pull(cotangent)[0]
    assert value.dtype == jnp.float32 and grad.dtype == dtype
    # What the few have besides the spread is a difference: as large a term again.
    assert_within(value, want.loss, want.loss_condition, 16, err_msg="loss")
    assert_within(grad, want.grad, want.grad_condition, 16, dtype, "gradient")


@pytest.mark.thorough
def test_classes_on_another_axis(rng):
    """The k entries stay last."""
    logits, labels, options = random_case(rng, (4, 5), 61, 7, True, ("where", "class_weights", "label_smoothing"))
    where, cotangent = options.pop("where"), np.float32(rng.normal(size=(4, 5)))

    def loss(z, probs, axis):
        few, exists = labels._replace(probs=probs), np.moveaxis(where, -1, axis)
        return jnp.sum(cotangent * cross_entropy(z, few, axis=axis, where=exists, reduction="none", **options))

    both = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    want, (dlogits, dprobs) = both(logits, labels.probs, -1)
    for axis in (0, 1):
        got, (moved, same) = both(np.moveaxis(logits, -1, axis), labels.probs, axis)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        np.testing.assert_allclose(np.moveaxis(moved, axis, -1), dlogits, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(same, dprobs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("others", few_of([True, False]), ids=["spread", "few"])
def test_gradients_of_probabilities_and_options(rng, others):
    """Of each entry, of duplicates each; of what is spread; of every option."""
    logits, labels, options = random_case(rng, (4, 5), 61, 7, others, tuple(ALL))
    where = options.pop("where")
    cotangent = rng.normal(size=(4, 5)).astype(np.float32)

    def sparse(probs, rest, options):
        few = SparseLabels(labels.ids, probs, rest)
        return jnp.sum(cotangent * cross_entropy(logits, few, where=where, reduction="none", **options))

    def through_dense(t, options):
        loss = cross_entropy(np.float64(logits), t, where=where, reduction="none", **options)
        return jnp.sum(np.float64(cotangent) * loss)

    t = np.float32(dense(labels, logits.shape, where))
    dt, doptions = in_float64(through_dense, t, options)
    got, *spread, got_options = jax.jit(jax.grad(sparse, (0, 1, 2) if others else (0, 2)))(
        labels.probs, labels.others, options
    )
    meant = labels.probs != 0
    want = np.take_along_axis(dt, np.clip(labels.ids, 0, 60), -1)
    np.testing.assert_allclose(np.asarray(got)[meant], want[meant], rtol=2e-5, atol=2e-5)
    for name, truth in doptions.items():
        np.testing.assert_allclose(got_options[name], truth, rtol=2e-5, atol=1e-4, err_msg=name)
    if others:
        listed = np.zeros(logits.shape, bool)
        for row in np.ndindex(4, 5):
            listed[row][labels.ids[row][meant[row]]] = True
        free = where & ~listed
        mean = np.sum(np.where(free, dt, 0), -1) / free.sum(-1)
        np.testing.assert_allclose(spread[0], mean, rtol=2e-5, atol=2e-5)


@pytest.mark.optimized
@pytest.mark.parametrize("k", few_of([3, 1]))
def test_a_one_hot_target_is_exact_at_every_margin(rng, k):
    logits, ids = at_margins(rng, MARGINS)
    few = np.full((len(ids), k), -7, np.int32)
    few[:, k // 2] = ids
    labels = SparseLabels(few, np.float32(few >= 0))
    cotangent = rng.normal(size=len(ids)).astype(np.float32)
    want = reference.cross_entropy(logits, ids, reduction="none", cotangent=np.float64(cotangent))
    loss, pull = jax.vjp(jax.jit(lambda z: cross_entropy(z, labels, reduction="none")), logits)
    assert relative_error(loss, want.loss).max() < PROMISE
    assert relative_error(pull(cotangent)[0], want.grad).max() < PROMISE


@pytest.mark.nan
def test_an_id_that_no_class_has_makes_its_row_nan(rng):
    """Loss and gradient of that row alone; of a row of weight 0 neither."""
    logits, labels, _ = random_case(rng, (5,), 11, 4)
    for row, bad in [(1, 11), (2, -1), (3, np.iinfo(np.int32).max), (4, -1)]:
        labels.ids[row, 0] = bad
    labels.probs[3] = [1, 0, 0, 0]
    weights = np.array([1, 1, 1, 1, 0], np.float32)
    loss = lambda z: cross_entropy(z, labels, weights=weights, reduction="none")  # noqa: E731
    value, pull = jax.vjp(jax.jit(loss), logits)
    grad = pull(jnp.ones(5, jnp.float32))[0]
    np.testing.assert_array_equal(np.isnan(value), [False, True, True, True, False])
    np.testing.assert_array_equal(np.isnan(grad).any(-1), [False, True, True, True, False])
    assert value[4] == 0 and not np.any(grad[4])


def test_a_few_of_probability_zero(rng):
    """-inf logits: of no matter without probability, inf with it; the same with all mass spread and with no class
    left to spread over."""
    logits = np.array([[0, 1, -np.inf]] * 3, np.float32)
    ids = np.array([[0, 2], [0, 2], [0, 1]])
    labels = SparseLabels(ids, np.array([[1, 0], [0.5, 0.5], [0.5, 0.5]], np.float32))
    losses, pull = jax.vjp(jax.jit(lambda z: cross_entropy(z, labels, reduction="none")), logits)
    value, grad = np.sum(losses[::2]), pull(np.float32([1, 0, 1]))[0]
    t = np.array([[1, 0, 0], [0, 0, 0], [0.5, 0.5, 0]])
    want = reference.cross_entropy(logits[::2], t[::2], reduction="sum")
    np.testing.assert_allclose(value, want.loss, rtol=1e-6)
    np.testing.assert_allclose(grad[::2], want.grad, rtol=1e-6)
    assert losses[1] == np.inf
    everything = SparseLabels(np.array([[0, 1]]), np.array([[0.5, 0.5]], np.float32), np.ones(1, np.float32))
    got = cross_entropy(logits[2:, :2], everything)
    np.testing.assert_allclose(got, cross_entropy(logits[2:, :2], np.full((1, 2), 0.5, np.float32)), rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("how", few_of([("mean", True), ("none", False)], thorough=0), ids=str)
def test_linear_is_plain(rng, how):
    reduction, transpose = how
    _, labels, options = random_case(rng, (3, 5), 61, 7, True, tuple(ALL))
    x, weight = (rng.normal(size=shape).astype(np.float32) for shape in [(3, 5, 24), (24, 61)])
    weight /= 5
    where = options.pop("where")
    cotangent = rng.normal(size=(3, 5) if reduction == "none" else ()).astype(np.float32)

    def plain(x, weight, options):
        t64 = np.float64(dense(labels, (3, 5, 61), where))
        return jnp.sum(
            np.float64(cotangent) * cross_entropy(x @ weight, t64, where=where, reduction=reduction, **options)
        )

    def linear(x, weight, options):
        head = weight.T if transpose else weight
        loss = linear_cross_entropy(
            x, head, labels, transpose_weight=transpose, where=where, reduction=reduction, chunk_size=4, **options
        )
        return jnp.sum(cotangent * loss)

    want = in_float64(plain, x, weight, options)
    got = jax.jit(jax.grad(linear, (0, 1, 2)))(x, weight, options)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.max(abs(np.asarray(a) - b)) < 512 * epsilon(jnp.float32) * np.max(abs(b))


@pytest.mark.compiled
@pytest.mark.cpu_compiler
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_nothing_of_logits_size_is_made_for_them(dtype):
    """The gradient of the logits is written once, in its own format; beside it there are blocks of tokens."""
    if dtype == jnp.bfloat16 and jax.__version_info__ < (0, 12):
        pytest.skip("XLA on the CPU scatters bfloat16 as float32")
    tokens, classes, k = 4096, 32000, 16
    logits, ids = jax.ShapeDtypeStruct((tokens, classes), dtype), jax.ShapeDtypeStruct((tokens, k), jnp.int32)
    probs = jax.ShapeDtypeStruct((tokens, k), jnp.float32)
    loss = lambda z, ids, p: cross_entropy(z, SparseLabels(ids, p, 1 - jnp.sum(p, -1)))  # noqa: E731
    program = jax.jit(jax.value_and_grad(loss)).lower(logits, ids, probs).compile()
    size = tokens * classes * jnp.dtype(dtype).itemsize
    assert program.memory_analysis().temp_size_in_bytes < 0.1 * size


OF_ONE_DEVICE = {}  # the gradients of the whole, once for each form


@pytest.mark.devices
@pytest.mark.thorough
@pytest.mark.compiled
@pytest.mark.diagonal
@pytest.mark.parametrize("how", few_of(["axis_name", "automatic", "explicit"], thorough=0))
@pytest.mark.parametrize("linear", few_of([True, False], thorough=0), ids=["linear", "logits"])
def test_over_8_devices(how, linear):
    """Tokens over two, classes over four, in each of JAX's ways: the loss and the gradients of the whole."""
    rng = np.random.default_rng(0)
    logits, labels, options = random_case(rng, (8, 6), 64, 7, True, tuple(ALL))
    x, weight = (rng.normal(size=shape).astype(np.float32) for shape in [(8, 6, 24), (24, 64)])
    weight /= 5
    where, c = options.pop("where"), options.pop("class_weights")
    cotangent = rng.normal(size=(8, 6)).astype(np.float32)

    def losses(arrays, probs, others, c, ids, where, **more):
        door = partial(linear_cross_entropy, chunk_size=7) if linear else cross_entropy
        few = SparseLabels(ids, probs, others)
        return door(*arrays, few, class_weights=c, where=where, reduction="none", **options, **more)

    def total(cotangent, run, *operands):
        return jnp.sum(cotangent.astype(operands[1].dtype) * run(*operands))

    operands = ((x, weight) if linear else (logits,), labels.probs, labels.others, c)
    fixed = labels.ids, where
    if linear not in OF_ONE_DEVICE:
        OF_ONE_DEVICE[linear] = in_float64(lambda *o: total(cotangent, losses, *o, *fixed), *operands)
    want = OF_ONE_DEVICE[linear]
    of_logits, tokens = P("data", None, "model"), P("data")
    specs = ((tokens, P(None, "model")) if linear else (of_logits,), tokens, tokens, P("model"), tokens, of_logits)
    mesh = mesh_of("explicit" if how == "explicit" else "automatic")
    local = partial(losses, axis_name="model")
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=tokens) if how == "axis_name" else losses
    put = lambda a, spec, mesh=mesh: jax.device_put(a, NamedSharding(mesh, spec))  # noqa: E731
    with jax.set_mesh(mesh):
        every = jax.tree.map(put, (*operands, *fixed), specs, is_leaf=lambda a: isinstance(a, np.ndarray))
        of = partial(total, put(cotangent, tokens), run)
        program = jax.jit(jax.grad(of, (0, 1, 2, 3))).lower(*every).compile()
        got = program(*every)
    assert {found.op for found in collectives(program)} <= {"all-reduce"}, how
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.max(abs(np.asarray(a) - b)) < 64 * epsilon(jnp.float32) * np.max(abs(b)), how


@pytest.mark.thorough
def test_vmap_and_second_derivatives(rng):
    logits, labels, _ = random_case(rng, (4,), 6, 5, True)
    both = lambda z, labels: cross_entropy(z, labels, reduction="none")  # noqa: E731
    np.testing.assert_array_equal(jax.vmap(cross_entropy)(logits, labels), both(logits, labels))
    row = jax.tree.map(lambda a: a[0], labels)
    got = jax.jit(jax.hessian(lambda z: cross_entropy(z, row)))(logits[0])
    total = dense(labels, logits.shape)[0].sum()
    np.testing.assert_allclose(got, total * reference.hessian(logits[0]), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("names", few_of([(), tuple(ALL)]), ids=len)
def test_forward_mode(rng, names):
    logits, labels, options = random_case(rng, (4,), 11, 5, True, names)
    tangent = rng.normal(size=(4, 11)).astype(np.float32)

    @jax.jit
    def both_modes(z, tangent):
        forward = jax.jvp(lambda z: cross_entropy(z, labels, forward_mode=True, **options), (z,), (tangent,))[1]
        return forward, jnp.sum(jax.grad(lambda z: cross_entropy(z, labels, **options))(z) * tangent)

    forward, reverse = both_modes(logits, tangent)
    np.testing.assert_allclose(forward, reverse, rtol=1e-5)


@pytest.mark.usefixtures("untyped")
def test_refuses():
    logits, ids, probs = jnp.zeros((2, 3)), jnp.zeros((2, 4), int), jnp.zeros((2, 4))
    for labels, error, message in [
        (SparseLabels(ids, ids), TypeError, "must have integer ids and floating probabilities; got"),
        (SparseLabels(ids, probs[:1]), ValueError, "must have ids and probs of shape (*batch, k) and others"),
        (SparseLabels(ids[0], probs[0]), ValueError, "of the batch shape, (2,) here; got [(4,), (4,)]"),
        (SparseLabels(ids, probs, probs), ValueError, "got [(2, 4), (2, 4), (2, 4)] for ids, probs, others."),
    ]:
        with pytest.raises(error, match=re.escape(message)):
            cross_entropy(logits, labels)
    with pytest.raises(
        ValueError, match="`ignore_index` goes with integer labels; got ignore_index=0 and SparseLabels"
    ):
        cross_entropy(logits, SparseLabels(ids, probs), ignore_index=0)


@pytest.mark.devices
@pytest.mark.parametrize("how", few_of(["explicit", "shard_map"]))
def test_one_class_here_and_over_devices(rng, how):
    """The only class of a device is that of each of its k entries."""
    labels = SparseLabels(np.array([[0, 0], [0, -1], [1, 0]]), np.float32([[0.5, 0.5], [1, 0], [0, 1]]))
    value, grad = jax.jit(jax.value_and_grad(lambda z: cross_entropy(z, labels)))(np.ones((3, 1), np.float32))
    assert value == 0 and not np.any(grad)

    logits, labels, _ = random_case(rng, (4,), 4, 5, True)
    labels.ids[:, 3] = 0
    want = reference.cross_entropy(logits, dense(labels, logits.shape), reduction="sum")
    mesh, spec = mesh_of("explicit" if how == "explicit" else "automatic"), P(None, "model")
    loss = lambda z, *few, **over: cross_entropy(z, SparseLabels(*few), reduction="sum", **over)  # noqa: E731
    if how == "shard_map":
        local = partial(loss, axis_name="model")
        loss = jax.shard_map(local, mesh=mesh, in_specs=(spec, P(), P(), P()), out_specs=P())
    places = tuple(NamedSharding(mesh, s) for s in (spec, P(), P(), P()))
    operands = jax.device_put((logits, *labels), places)
    value, grad = jax.jit(jax.value_and_grad(loss))(*operands)
    np.testing.assert_allclose(value, want.loss, rtol=1e-6)
    np.testing.assert_allclose(grad, want.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
@pytest.mark.nan
@pytest.mark.parametrize("held", few_of([np.nan, np.inf], thorough=0))
def test_a_row_of_weight_zero_may_hold_anything_in_others(rng, held):
    """Every gradient is that of the batch without the row, but for the weight's own part in the divisor."""
    logits, labels, _ = random_case(rng, (3,), 5, 4, True)
    labels.ids[:, 3], labels.others[1] = 0, held
    weights, c, kept = np.float32([1, 0, 2]), rng.uniform(0.5, 2, 5).astype(np.float32), [0, 2]

    def loss(z, probs, others, ids, weights, c, smoothing):
        few = SparseLabels(ids, probs, others)
        return cross_entropy(z, few, weights=weights, class_weights=c, label_smoothing=smoothing)

    every = jax.jit(jax.grad(loss, (0, 1, 2, 4, 5, 6)))
    got = every(logits, labels.probs, labels.others, labels.ids, weights, c, np.float32(0.1))
    few = [a[kept] for a in (logits, labels.probs, labels.others, labels.ids, weights)]
    want = every(*few, c, np.float32(0.1))
    for a, b in zip(got, want, strict=True):
        a = np.asarray(a)
        np.testing.assert_allclose(a[kept] if len(a.shape) and len(a) == 3 else a, b, rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(got[3])) and not any(np.any(a[1]) for a in got[:3])


def test_a_cotangent_of_zero_beside_an_infinite_loss(rng):
    """A row whose loss is infinite but asked for by 0 has gradients of 0: probabilities, class weights, logits."""
    logits = rng.normal(size=(2, 5)).astype(np.float32)
    logits[0, 3], c = -np.inf, rng.uniform(0.5, 2, 5).astype(np.float32)
    ids, probs = np.int32([[3, 1], [3, 1]]), np.float32([[0.5, 0.5], [0.5, 0.5]])

    def losses(logits, probs, c):
        return cross_entropy(logits, SparseLabels(ids, probs), class_weights=c, reduction="none")

    cotangent = np.float32([0, rng.normal()])

    @jax.jit
    def both(*operands):
        loss, pull = jax.vjp(losses, *operands)
        return loss, pull(cotangent)

    loss, (dlogits, dprobs, dc) = both(logits, probs, c)
    assert loss[0] == np.inf
    _, alone = both(np.maximum(logits, -9), probs, c)
    assert not np.any(dlogits[0]) and not np.any(dprobs[0])
    t = reference.dense_labels(ids, probs, None, np.ones((2, 5), bool))[1:]
    of_row = np.float64(cotangent[1:])
    want = reference.cross_entropy(logits[1:], t, class_weights=c, reduction="none", cotangent=of_row)
    assert_within(dlogits[1:], want.grad, want.grad_condition, 8)
    for got, want in zip((dlogits, dprobs, dc), alone, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
