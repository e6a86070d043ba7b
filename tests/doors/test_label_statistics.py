"""label_statistics and linear_label_statistics against NumPy in float64."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import MARGINS, PROMISE, assert_within, at_margins, epsilon, few_of, relative_error
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import collectives, mesh_of

from softmax_jax import cross_entropy, label_statistics, linear_label_statistics

FLOATS = ("log_prob", "log_normalizer", "entropy")
ALL = {"where": True, "logit_scale": 0.7, "softcap": 5.0}


def differentiated(statistics, count):
    """f(cotangents, *operands): (gradients of Σ cotangent · value, statistics), jitted."""

    def weighted(cotangents, *operands):
        found = statistics(*operands)
        return sum(jnp.sum(c * getattr(found, name)) for c, name in zip(cotangents, FLOATS, strict=True)), found

    return jax.jit(jax.grad(weighted, tuple(range(1, count + 1)), has_aux=True))


def with_gradient(statistics, cotangents, *operands):
    """(statistics, gradients of Σ cotangent · value)."""
    gradients, found = differentiated(statistics, len(operands))(cotangents, *operands)
    return found, gradients


def random_cotangents(rng, batch):
    return tuple(rng.normal(size=batch).astype(np.float32) for _ in FLOATS)


def random_case(rng, shape, dtype=jnp.float32, names=()):
    logits = np.array(3 * rng.normal(size=shape)).astype(dtype)
    labels = rng.integers(0, shape[-1], shape[:-1]).astype(np.int32)
    options = {name: ALL[name] for name in names}
    if "where" in options:
        options["where"] = (rng.random(shape) < 0.7) | (np.arange(shape[-1]) == labels[..., None])
    return logits, labels, options


def check(found, want, k=16):
    for name, value, condition in zip(FLOATS, want.values, want.conditions, strict=False):
        assert_within(getattr(found, name), value, condition, k, err_msg=name)
    np.testing.assert_array_equal(found.correct, want.values[3])
    np.testing.assert_array_equal(found.rank, want.values[4])


EVERY = [(jnp.bfloat16, tuple(ALL)), (jnp.float32, ()), (jnp.float16, tuple(ALL)), (jnp.float32, tuple(ALL))]
EVERY += [(jnp.float32, (name,)) for name in ALL]


@pytest.mark.parametrize("case", few_of(EVERY, thorough=3), ids=str)
def test_every_option_and_format(rng, case):
    dtype, names = case
    logits, labels, options = random_case(rng, (3, 5, 61), dtype, names)
    cotangents = random_cotangents(rng, (3, 5))
    want = reference.label_statistics(logits, labels, cotangents, **options)
    found, (grad,) = with_gradient(lambda z: label_statistics(z, labels, **options), cotangents, logits)
    check(found, want)
    assert grad.dtype == dtype
    assert_within(grad, want.grad, want.grad_condition, 16, dtype, "gradient")


@pytest.mark.optimized
def test_every_margin_from_minus_100_to_100(rng):
    """Relative errors, also of a confident token's entropy, and of its gradient where the three do not cancel."""
    logits, labels = at_margins(rng, MARGINS)
    zero, cotangent = np.zeros(len(logits), np.float32), rng.normal(size=len(logits)).astype(np.float32)
    program = differentiated(lambda z: label_statistics(z, labels), 1)
    for index in range(3):
        cotangents = [cotangent if index == i else zero for i in range(3)]
        want = reference.label_statistics(logits, labels, cotangents)
        (grad,), found = program(cotangents, logits)
        check(found, want)
        assert relative_error(found.log_prob, want.values[0]).max() < PROMISE
        assert relative_error(found.entropy, want.values[2]).max() < PROMISE
        if index == 0:
            assert relative_error(grad, want.grad).max() < PROMISE
        assert_within(grad, want.grad, want.grad_condition, 16, err_msg=FLOATS[index])
    # From margin 5 on, at the label: p (-log p - H), which loses nothing but where -log p = H.
    confident = (MARGINS > 5) & (abs(want.grad[np.arange(len(logits)), labels]) > 1e-30)
    rows = np.nonzero(confident)[0]
    got, truth = (np.asarray(g)[rows, labels[rows]] for g in (grad, want.grad))
    assert len(rows) > 100
    assert relative_error(got, truth).max() < PROMISE


@pytest.mark.diagonal
@pytest.mark.optimized
@pytest.mark.compiled
@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.devices)], ids=["alone", "8 devices"])
@pytest.mark.parametrize("linear", few_of([True, False]), ids=["linear", "logits"])
def test_every_margin_in_every_form(rng, linear, sharded):
    """Relative errors of the three, and of the gradients that do not cancel; of heads whose logits are exact; tokens
    over two devices, classes over four."""
    logits, labels = at_margins(rng, MARGINS[:400], classes=12)
    cotangent, zero = rng.normal(size=400).astype(np.float32), np.zeros(400, np.float32)

    def statistics(logits, identity, labels, **more):
        if linear:
            return linear_label_statistics(logits, identity, labels, chunk_size=32, **more)
        return label_statistics(logits, labels, **more)

    run = statistics
    if sharded:
        specs = P("data") if linear else P("data", "model"), P(None, "model"), P("data")
        local = partial(statistics, axis_name="model")
        run = jax.shard_map(local, mesh=mesh_of("automatic"), in_specs=specs, out_specs=P("data"))
    program, identity = differentiated(lambda z, w: run(z, w, labels), 2), np.eye(12, dtype=np.float32)
    for index, asked in enumerate(FLOATS):
        cotangents = [cotangent if index == i else zero for i in range(3)]
        want = reference.label_statistics(logits, labels, cotangents)
        (grad, _), found = program(cotangents, logits, identity)
        for name, value in zip(FLOATS, want.values, strict=False):
            assert relative_error(getattr(found, name), value).max() < PROMISE, name
        assert_within(grad, want.grad, want.grad_condition, 16, err_msg=asked)
        if asked != "entropy":
            assert relative_error(grad, want.grad).max() < PROMISE, asked


def test_another_axis_and_eager(rng):
    logits, labels, options = random_case(rng, (3, 5, 7), names=("where",))
    cotangents = random_cotangents(rng, (3, 5))
    want = reference.label_statistics(logits, labels, cotangents, **options)
    found = label_statistics(jnp.moveaxis(logits, -1, 0), labels, axis=0, where=np.moveaxis(options["where"], -1, 0))
    check(found, want)


def test_of_equal_logits_the_first_is_correct_and_none_ranks_before_another():
    logits = jnp.array([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, -0.0, -jnp.inf, 1e-30]])
    for label, correct, rank in [(0, [0, 1, 0], [2, 0, 1]), (1, [1, 0, 0], [0, 0, 1]), (2, [0, 0, 0], [0, 0, 3]),
                                 (3, [0, 0, 1], [3, 0, 0])]:  # fmt: skip
        found = jax.jit(label_statistics)(logits, jnp.full(3, label))
        np.testing.assert_array_equal(found.correct, np.array(correct, bool))
        np.testing.assert_array_equal(found.rank, rank)


def test_ranks_in_rows_longer_than_a_block(rng):
    logits = rng.permutation(70000).astype(np.float32)[None] / 1000
    for label in (0, 17499, 17500, 69999, int(logits[0].argmax())):
        found = label_statistics(logits, np.array([label]))
        assert int(found.rank[0]) == int((logits[0] > logits[0, label]).sum())
        assert bool(found.correct[0]) == (label == logits[0].argmax())


@pytest.mark.nan
def test_edges(rng):
    """-inf, a hidden label, no classes, NaN, an id that no class has."""
    inf, nan = np.inf, np.nan
    logits = np.array([[0, -inf, 0], [1, 2, 3], [1, 2, 3], [0, nan, 0], [-inf] * 3, [1, 2, 3], [inf, 0, 0]], np.float32)
    where = np.ones((7, 3), bool)
    where[1, 2], where[2] = False, False
    labels = jnp.array([1, 2, 0, 0, 0, 3, 0])
    found, (grad,) = with_gradient(
        lambda z: label_statistics(z, labels, where=where), random_cotangents(rng, (7,)), logits
    )
    bad = [False, False, False, True, True, True, True]
    np.testing.assert_array_equal(np.isnan(found.log_prob), bad)
    row = [False, False, False, True, True, False, True]  # an id that no class has is of no matter to its row
    np.testing.assert_array_equal(np.isnan(found.log_normalizer), row)
    np.testing.assert_array_equal(np.isnan(found.entropy), row)
    np.testing.assert_array_equal(np.asarray(found.log_prob)[:3], [-inf, -inf, 0])
    log2, pair = np.log(2), np.log1p(np.exp(-1.0))
    np.testing.assert_allclose(np.asarray(found.log_normalizer)[:3], [log2, 2 + pair, 0], rtol=1e-6)
    np.testing.assert_allclose(
        np.asarray(found.entropy)[:3], [log2, pair + np.exp(-1) / (1 + np.exp(-1)), 0], rtol=1e-6
    )
    np.testing.assert_array_equal(found.rank, [2, 2, 0, -1, -1, -1, -1])
    assert not np.any(found.correct)
    np.testing.assert_array_equal(np.asarray(grad)[2], 0)
    np.testing.assert_array_equal(np.isnan(grad).any(-1), bad)


def of_head(x, weight, bias, labels, cotangents, options):
    """What the statistics of x @ weight + bias are, and their gradients, in float64."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    want = reference.label_statistics(x @ weight + bias, labels, cotangents, **options)
    flat = want.grad.reshape(-1, weight.shape[1])
    return want, (want.grad @ weight.T, x.reshape(-1, x.shape[-1]).T @ flat, flat.sum(0))


def check_head(found, grads, want, truth):
    """The product's rounding is one more, of the size of its terms: about 1e-6 of a logit."""
    for name, value in zip(FLOATS, want.values, strict=False):
        np.testing.assert_allclose(getattr(found, name), value, rtol=2e-5, err_msg=name)
    np.testing.assert_array_equal(found.correct, want.values[3])
    np.testing.assert_array_equal(found.rank, want.values[4])
    for got, right in zip(grads, truth, strict=True):
        assert np.max(abs(np.asarray(got) - right)) < 64 * epsilon(jnp.float32) * np.max(abs(right))


@pytest.mark.parametrize("case", few_of([(tuple(ALL), 4, True), ((), 1, True), ((), 100, False)]), ids=str)
def test_linear_is_plain(rng, case):
    """Values and the gradients of x, weight and bias, in chunks that do not divide the tokens; both layouts."""
    names, chunk_size, transpose = case
    _, labels, options = random_case(rng, (3, 5, 61), names=names)
    x = rng.normal(size=(3, 5, 24)).astype(np.float32)
    weight, bias = rng.normal(size=(24, 61)).astype(np.float32) / 5, rng.normal(size=61).astype(np.float32)
    cotangents = random_cotangents(rng, (3, 5))
    turned = np.transpose if transpose else np.asarray
    linear = partial(linear_label_statistics, transpose_weight=transpose, chunk_size=chunk_size, **options)
    of = lambda x, w, b: linear(x, w, labels, bias=b)  # noqa: E731
    found, (dx, dweight, dbias) = with_gradient(of, cotangents, x, turned(weight), bias)
    check_head(found, (dx, turned(dweight), dbias), *of_head(x, weight, bias, labels, cotangents, options))


@pytest.mark.thorough
@pytest.mark.compiled
@pytest.mark.cpu_compiler
def test_linear_memory_is_that_of_the_loss_whatever_the_tokens():
    """Two chunks of logits and the head's gradient, as `linear_cross_entropy` has."""

    def temporary(tokens):
        def loss(x, w, y):
            found = linear_label_statistics(x, w, y, chunk_size=256)
            return jnp.sum(found.log_prob + found.entropy)

        kinds = [((tokens, 64), jnp.float32), ((64, 16000), jnp.float32), ((tokens,), jnp.int32)]
        shapes = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
        return jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    chunk, head = 4 * 256 * 16000, 4 * 64 * 16000
    once, twice = temporary(1024), temporary(2048)
    assert once <= 1.1 * (2 * chunk + head)
    assert twice - once <= 1024 * (3 * 64 * 4 + 64)


@pytest.mark.compiled
@pytest.mark.cpu_compiler
def test_nothing_of_logits_size_is_kept_and_only_what_is_used_is_computed():
    logits, labels = jax.ShapeDtypeStruct((4096, 32000), jnp.float32), jnp.zeros(4096, jnp.int32)

    def program(f):
        return jax.jit(f).lower(logits).compile()

    every = program(lambda z: label_statistics(z, labels))
    one = program(lambda z: label_statistics(z, labels).log_prob)
    flops = lambda program: program.cost_analysis()["flops"]  # noqa: E731
    assert flops(one) < 0.6 * flops(every)
    size = 4 * 4096 * 32000
    assert every.memory_analysis().temp_size_in_bytes < 0.1 * size

    grad = program(jax.grad(lambda z: jnp.sum(label_statistics(z, labels).entropy)))
    assert grad.memory_analysis().temp_size_in_bytes < 0.1 * size


@pytest.mark.devices
@pytest.mark.diagonal
@pytest.mark.compiled
@pytest.mark.parametrize("how", few_of(["axis_name", "automatic", "explicit"]))
@pytest.mark.parametrize("linear", few_of([True, False]), ids=["linear", "logits"])
def test_over_8_devices(rng, how, linear):
    """Tokens over two, classes over four: the numbers of the whole, and nothing of logits size moves."""
    logits, labels, options = random_case(rng, (8, 6, 64), names=tuple(ALL))
    x, weight = rng.normal(size=(8, 6, 24)).astype(np.float32), rng.normal(size=(24, 64)).astype(np.float32) / 5
    cotangents = random_cotangents(rng, (8, 6))
    if linear:
        want, (*truth, _) = of_head(x, weight, 0, labels, cotangents, options)
    else:
        want = reference.label_statistics(logits, labels, cotangents, **options)
        truth = [want.grad]
    where = options.pop("where")
    door = partial(linear_label_statistics, chunk_size=7) if linear else label_statistics

    def statistics(*operands, **more):
        *arrays, labels, where = operands
        return door(*arrays, labels, where=where, **options, **more)

    mesh, of_logits = mesh_of("explicit" if how == "explicit" else "automatic"), P("data", None, "model")
    specs = (*((P("data"), P(None, "model")) if linear else (of_logits,)), P("data"), of_logits)
    if how == "axis_name":
        local = partial(statistics, axis_name="model")
        run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"))
    else:
        run = statistics
    operands = (*((x, weight) if linear else (logits,)), labels, where)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(operands, specs, strict=True)]
        jitted = differentiated(lambda *o: run(*o, *placed[-2:]), len(placed) - 2)
        program = jitted.lower(cotangents, *placed[:-2]).compile()
        grads, found = program(cotangents, *placed[:-2])
    of_tokens = lambda c: c.op == "all-gather" and c.largest <= labels.size * 4  # of a prediction  # noqa: E731
    assert all(c.op == "all-reduce" or of_tokens(c) for c in collectives(program))
    check_head(found, grads, want, truth)


@pytest.mark.parametrize("margin", few_of([0, 30, -30]))
def test_derivatives_in_both_modes(rng, margin):
    """The reverse ones have float64's truth above. An entry is -p_v (log p_v + entropy) of the entropy, of the others
    ± p_v or 1 - p_y, none of which cancels."""
    logits, labels, _ = random_case(rng, (5, 7))
    logits[np.arange(5), labels] += margin
    direction = rng.normal(size=logits.shape).astype(np.float32)
    floats = lambda z, **how: label_statistics(z, labels, **how)[:3]  # noqa: E731
    by_flag = partial(floats, forward_mode=True)
    both = jax.jit(lambda z, dz: (jax.jvp(by_flag, (z,), (dz,))[1], jax.jacrev(floats)(z), jax.jacfwd(by_flag)(z)))
    log_p = reference.log_softmax(np.float64(logits))
    p = np.exp(log_p)
    sizes = [np.where(np.eye(7)[labels] == 1, 1 - p, p), p, p * (np.abs(log_p) - (p * log_p).sum(-1, keepdims=True))]
    for tangent, reverse, forward, size in zip(*both(logits, direction), sizes, strict=True):
        terms, each = np.float64(reverse) * direction, np.eye(5)[:, :, None] * size
        assert_within(tangent, terms.sum((1, 2)), np.abs(size * direction).sum(-1), 16)
        assert_within(forward, np.float64(reverse), each, 16)


@pytest.mark.thorough
def test_vmap_and_second_derivatives(rng):
    """A row at a time as all at once; the Hessian of log_prob is minus the loss's, whose truth is known."""
    logits, labels, _ = random_case(rng, (4, 6))
    every, each = label_statistics(logits, labels), jax.vmap(label_statistics)(logits, labels)
    jax.tree.map(np.testing.assert_array_equal, every, each)
    hessian = jax.jit(jax.hessian(lambda z: label_statistics(z, labels[0]).log_prob))(logits[0])
    np.testing.assert_allclose(hessian, -reference.hessian(logits[0]), rtol=2e-5, atol=1e-7)

    def entropy(z):
        p = jax.nn.softmax(z)
        return -jnp.sum(p * jnp.log(p))

    with jax.enable_x64(True):
        want = jax.hessian(entropy)(np.float64(logits[0]))
    got = jax.jit(jax.hessian(lambda z: label_statistics(z, labels[0]).entropy))(logits[0])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("linear", few_of([True, False]), ids=["linear", "logits"])
def test_ignored_rows_are_0_with_their_gradients(rng, linear):
    """Whatever they hold; the others are as they are."""
    x, weight = rng.normal(size=(5, 8)).astype(np.float32), rng.normal(size=(8, 11)).astype(np.float32)
    labels, kept = np.array([3, -100, 0, -100, 10]), [0, 2, 4]
    cotangents = random_cotangents(rng, (5,))
    door = partial(linear_label_statistics, ignore_index=-100, chunk_size=2)
    plain = lambda x, w, y: label_statistics(x @ w, y, ignore_index=-100)  # noqa: E731
    statistics = door if linear else plain
    found, (dx, dweight) = with_gradient(lambda x, w: statistics(x, w, labels), cotangents, x, weight)
    assert not any(np.any(np.asarray(a)[[1, 3]]) for a in (*found, dx))
    want, (dfew, dtruth, _) = of_head(x[kept], weight, 0, labels[kept], [c[kept] for c in cotangents], {})
    few = jax.tree.map(lambda a: np.asarray(a)[kept], found)
    check_head(few, (np.asarray(dx)[kept], dweight), want, (dfew, dtruth))


def test_float64_ranks_tell_what_float32_cannot():
    with jax.enable_x64(True):
        logits = np.array([[0, 1e-40, 1e-38, 1e-37]])
        ranks = [int(label_statistics(logits, np.array([label])).rank[0]) for label in range(4)]
    assert ranks == [3, 2, 1, 0]


def test_log_prob_is_minus_the_loss(rng):
    logits, labels, options = random_case(rng, (16, 61), names=tuple(ALL))
    loss = lambda z: cross_entropy(z, labels, reduction="none", **options)  # noqa: E731
    log_prob = lambda z: label_statistics(z, labels, **options).log_prob  # noqa: E731
    got, want = jax.jit(lambda z: (log_prob(z), -loss(z)))(logits)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.usefixtures("untyped")
def test_refuses():
    logits = jnp.zeros((2, 3))
    for labels, error, message in [
        (jnp.zeros((2, 3), jnp.float32), TypeError, "`labels` must be integers; got dtype float32. Pass class ids."),
        (jnp.zeros(3, int), ValueError, "integer `labels` must have shape (2,); got labels.shape=(3,)"),
    ]:
        with pytest.raises(error, match=re.escape(message)):
            label_statistics(logits, labels)
    with pytest.raises(ValueError, match="`softcap` must be a finite number"):
        label_statistics(logits, jnp.zeros(2, int), softcap=-1.0)
    with pytest.raises(ValueError, match="`x` and `weight` must share the embed axis"):
        linear_label_statistics(jnp.zeros((2, 4)), jnp.zeros((3, 5)), jnp.zeros(2, int))
