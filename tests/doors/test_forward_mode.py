"""Forward mode, by the flag: jvp, jacfwd, linearize, which agree with the gradient; and hessian, which needs none."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ALONE, FLOATS, epsilon, few_of, random_case

from softmax_jax import (
    SparseLabels,
    cross_entropy,
    kl_divergence,
    label_statistics,
    linear_cross_entropy,
    linear_kl_divergence,
    linear_label_statistics,
    sum_over_chunks,
)

FORWARD = {"forward_mode": True}

# Both go through the same sums; their derivatives are at most a few dozen products and sums of them.
BUDGET = 64 * epsilon(jnp.float32)


DIFFERENTIABLE = ("weights", "class_weights", *FLOATS)


def differentiable(rng, dense, what=""):
    """f(point), and a point of all operands that have a gradient; `what` the logits are or hold."""
    left_out = ["ignore_index"] * dense + ["softcap", "label_smoothing"] * (
        what == "-inf"
    )  # else a -softcap, or a loss of inf
    names = [name for name in ALONE if name not in left_out]
    shape, axis = ((7, 5), 0) if what == "other axis" else ((5, 7), -1)
    dtype = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}.get(what, jnp.float32)
    logits, labels, options = random_case(rng, shape, axis, dtype, dense, names)
    if what == "NaN row":
        options["weights"] = np.float32([1, 0, 2, 0.5, 1.5])
        logits[1] = np.nan
    elif what == "hidden NaN":
        logits[~options["where"]] = np.nan
    elif what == "-inf":
        options["where"][:, 3], logits[:, 2] = True, -np.inf
        labels = np.where(np.arange(7) == 2, 0, labels) if dense else np.where(labels == 2, 3, labels)
    floats = {name: jnp.asarray(options.pop(name)) for name in names if name in DIFFERENTIABLE}
    floats["logits"] = jnp.asarray(logits)
    if dense:
        floats["labels"] = jnp.asarray(labels)

    def f(point, **how):
        rest = {"labels": jnp.asarray(labels)} | point
        return cross_entropy(rest.pop("logits"), rest.pop("labels"), **options, **rest, **how)

    return f, floats


def assert_close(got, want, atol=BUDGET):
    numbers = lambda a: np.asarray(a, np.float64)  # noqa: E731
    scaled = lambda tree: jax.tree.map(lambda a, w: numbers(a) / (1 + np.max(np.abs(numbers(w)))), tree, want)  # noqa: E731
    chex.assert_trees_all_close(scaled(got), scaled(want), rtol=0, atol=atol)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "integer"])
def test_derivatives_along_a_direction_are_those_of_the_gradient(rng, dense):
    f, point = differentiable(rng, dense)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), point)

    @jax.jit
    def both_modes(point, direction):
        forward = partial(f, **FORWARD)
        along = jax.jvp(forward, (point,), (direction,)), jax.linearize(forward, point)[1](direction)
        of_logits = lambda x: forward(point | {"logits": x})  # noqa: E731
        jacobian = jax.jacfwd(of_logits)(point["logits"])
        return along, jacobian, jax.value_and_grad(f)(point), jax.value_and_grad(forward)(point)

    along, jacobian, (value, gradient), by_flag = both_modes(point, direction)
    want = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))
    assert_close((along, jacobian, by_flag), (((value, want), want), gradient["logits"], (value, gradient)))


@pytest.mark.parametrize("door", ["cross_entropy", "linear_cross_entropy", "kl_divergence", "linear_label_statistics"])
def test_without_the_flag_jax_says_that_there_is_none(door):
    z, y = jnp.ones((3, 3)), jnp.zeros(3, int)
    calls = {
        "cross_entropy": lambda z: cross_entropy(z, y),
        "linear_cross_entropy": lambda z: linear_cross_entropy(z, z, y),
        "kl_divergence": lambda z: kl_divergence(z, teacher_logits=z),
        "linear_label_statistics": lambda z: linear_label_statistics(z, z, y).log_prob,
    }
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(calls[door], (z,), (z,))


def in_chunks(rng):
    """name: (f(point), point) of every function whose tokens go through in chunks, of which the last is not full."""
    logits, labels, options = random_case(rng, (10, 7), names=ALONE)
    del options["axis"]
    floats = {name: jnp.asarray(options.pop(name)) for name in DIFFERENTIABLE}
    head = {name: jnp.float32(rng.normal(size=size)) for name, size in {"x": (10, 4), "weight": (4, 7)}.items()}
    bias, teacher, few = jnp.float32(rng.normal(size=7)), rng.dirichlet(np.ones(7), 10), rng.integers(0, 7, (10, 3))
    probs, of_few = jnp.float32(teacher), jnp.float32(teacher[:, :3])

    def loss(p, reduction="mean", **how):
        found = linear_cross_entropy(labels=labels, reduction=reduction, chunk_size=4, **options, **p, **how)
        return jnp.sum(jnp.sin(found))

    def divergence(p, **how):
        teacher = {"teacher_x": p["x"] * p["x"], "teacher_weight": p["weight"]}
        return linear_kl_divergence(p["x"], p["weight"], **teacher, beta=0.3, chunk_size=4, **how)

    def statistics(p, **how):
        told = linear_label_statistics(**p, labels=labels, chunk_size=4, **how)
        return jnp.sum(told.log_prob * told.entropy)

    def of_head(p, **how):
        of_chunk = lambda weight, chunk: cross_entropy(jnp.tanh(chunk[0]) @ weight, chunk[1], reduction="sum", **how)  # noqa: E731
        return sum_over_chunks(of_chunk, p["weight"], (p["x"].reshape(-1, 2, 4), labels.reshape(-1, 2)), **how)

    yield "linear", loss, {**floats, **head, "bias": bias}
    yield "linear, none", partial(loss, reduction="none"), {**floats, **head}
    z, t, k = jnp.asarray(logits), {"probs": probs}, {"probs": of_few}
    of_probs = lambda p, **how: kl_divergence(p["z"], teacher_probs=p["probs"], chunk_size=4, **how)  # noqa: E731
    yield "probabilities", of_probs, {"z": z, **t}
    of_sparse = lambda p, **how: of_probs({"z": p["z"], "probs": SparseLabels(few, p["probs"])}, **how)  # noqa: E731
    yield "few probabilities", of_sparse, {"z": z, **k}
    yield "linear divergence", divergence, head
    yield "linear statistics", statistics, head
    yield "head", of_head, head


CHUNKED = [name for name, *_ in in_chunks(np.random.default_rng(0))]


@pytest.mark.parametrize("name", few_of(CHUNKED, 3))
def test_chunk_by_chunk(rng, name):
    """The value along a direction, and again after a gradient was asked for; second derivatives, by both orders."""
    f, point = next((f, point) for of, f, point in in_chunks(rng) if of == name)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), point)
    forward = partial(f, **FORWARD)
    along = lambda p: jax.jvp(forward, (p,), (direction,))[1]  # noqa: E731

    @jax.jit
    def both_modes(point):
        by_slope = jax.grad(along)(point), jax.jvp(jax.grad(f), (point,), (direction,))[1]
        return along(point), jax.grad(f)(point), along(point), by_slope, jax.grad(forward)(point)

    first, gradient, again, (reverse_of_forward, forward_of_reverse), by_flag = both_modes(point)
    want = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))
    assert_close((first, again, by_flag), (want, want, gradient))
    assert_close(reverse_of_forward, forward_of_reverse)
    only = {name: direction[name] for name in list(point)[:1]}
    of_one = lambda some: forward({**point, **some})  # noqa: E731
    of_first = jax.jit(lambda p: jax.jvp(of_one, (p,), (only,))[1])({name: point[name] for name in only})
    assert_close(of_first, sum(jnp.vdot(gradient[name], only[name]) for name in only))


OF_TWO = {
    "statistics": lambda z, t: jnp.sum(jnp.sin(label_statistics(z + t * t, np.arange(5)).log_prob)),
    "dense": lambda z, t: cross_entropy(z, t, z_loss=0.1),
    "mixture": lambda z, t: kl_divergence(z, teacher_logits=t, beta=0.3),
    "linear": lambda x, w: linear_cross_entropy(x, w.T, np.arange(5), chunk_size=2),
}


@pytest.mark.parametrize("name", few_of(list(OF_TWO), 3))
def test_second_derivatives_by_both_operands_of_the_gradient_of_one(rng, name):
    """Of a gradient by both, of which one alone is used: reverse over reverse, against forward over reverse."""
    f, (a, b, along) = OF_TWO[name], (jnp.float32(rng.normal(size=(5, 5))) for _ in range(3))

    @jax.jit
    def both_orders(a, b):
        of_first = lambda a, b: jnp.vdot(jax.grad(f, (0, 1))(a, b)[0], along)  # noqa: E731
        return jax.grad(of_first, (0, 1))(a, b), jax.jvp(jax.grad(f, (0, 1)), (a, b), (along, jnp.zeros_like(b)))[1]

    assert_close(*both_orders(a, b))


def test_a_direction_along_which_nothing_changes(rng):
    """Logits and temperature grow alike: a tangent of logits / temperature is 0, and has a derivative all the same."""
    f = lambda p, **how: kl_divergence(p["a"], teacher_logits=p["b"], temperature=p["temperature"], **how)  # noqa: E731
    point = {name: jnp.float32(rng.normal(size=(3, 5))) for name in ("a", "b")} | {"temperature": jnp.float32(2)}
    other = jax.tree.map(lambda a: jnp.float32(rng.normal(size=a.shape)), point)

    @jax.jit
    def both_orders(point, other):
        along = lambda p: jax.jvp(partial(f, **FORWARD), (p,), (point,))[1]  # noqa: E731
        by_gradient = jax.jvp(jax.grad(f), (point,), (point,))[1]
        return jax.jvp(along, (point,), (other,)), sum(jax.tree.leaves(jax.tree.map(jnp.vdot, by_gradient, other)))

    (first, second), want = both_orders(point, other)
    assert_close((first, second), (jnp.zeros_like(first), want))


@jax.custom_vjp
def reverse_only(x):
    return jnp.sin(x)


reverse_only.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.cos(x) * g,))


def test_a_head_that_has_no_forward_mode_has_its_gradient(rng):
    """Under vmap too: nothing of forward mode is traced for a gradient."""
    weights, chunks = (jnp.float32(rng.normal(size=size)) for size in ((3, 5), (4, 2, 5)))
    of_chunk = lambda w, chunk: jnp.sum(reverse_only(chunk * w[None]))  # noqa: E731
    f = lambda w, **how: sum_over_chunks(of_chunk, w, chunks, **how)  # noqa: E731
    got = jax.jit(jax.vmap(jax.grad(f)))(weights)
    want = jax.vmap(jax.grad(lambda w: jnp.sum(jnp.sin(chunks * w[None, None]))))(weights)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jit(lambda w: jax.jvp(partial(f, **FORWARD), (w,), (w,)))(weights[0])


@pytest.mark.thorough
@pytest.mark.parametrize("dense", few_of([True, False], thorough=0), ids=["dense", "integer"])
def test_second_derivatives_are_the_same_in_every_order(rng, dense):
    f, point = differentiable(rng, dense)

    @jax.jit
    def hessians(x):
        of_logits = lambda x, **how: f(point | {"logits": x}, **how)  # noqa: E731
        by_flag, modes = partial(of_logits, **FORWARD), (jax.jacfwd, jax.jacrev)
        plain = [outer(jax.jacrev(of_logits))(x) for outer in modes]
        return plain + [outer(inner(by_flag))(x) for outer in modes for inner in modes]

    want, *others = hessians(point["logits"])
    for got in others:
        assert_close(got, want)


@pytest.mark.diagonal
@pytest.mark.nan
@pytest.mark.parametrize("dense", few_of([False, True]), ids=["integer", "dense"])
@pytest.mark.parametrize("what", few_of(["-inf", "bfloat16", "hidden NaN", "other axis", "float16"], thorough=3))
def test_derivatives_of_awkward_logits_are_those_of_the_gradient(rng, what, dense):
    """Of the same numbers in float32: a gradient of 16-bit logits is rounded once more."""
    f, point = differentiable(rng, dense, what)
    direction = jax.tree.map(lambda a: np.asarray(rng.normal(size=a.shape), a.dtype), point)
    widened = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.float32), tree)  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(f))(widened(point))
    chex.assert_tree_all_finite((value, gradient))
    along = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, widened(direction))))

    @jax.jit
    def both_modes(point, direction):
        return jax.jvp(partial(f, **FORWARD), (point,), (direction,)), jax.grad(f)(point)

    along_direction, rounded = both_modes(point, direction)
    assert_close(along_direction, (value, along))
    assert_close(widened(rounded), gradient, BUDGET + epsilon(point["logits"].dtype) / 2)


@pytest.mark.parametrize("dense", few_of([False, True]), ids=["integer", "dense"])
def test_a_row_of_weight_zero_that_holds_nan_has_derivative_zero(rng, dense):
    f, point = differentiable(rng, dense, "NaN row")
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), point)
    along, gradient = jax.jit(lambda p, d: (jax.jvp(partial(f, **FORWARD), (p,), (d,)), jax.grad(f)(p)))(
        point, direction
    )
    chex.assert_tree_all_finite((along, gradient))
    np.testing.assert_array_equal(gradient["logits"][1], 0)
    assert_close(along[1], sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction))))


@pytest.mark.optimized
def test_exact_in_the_tail():
    logits = np.float32([[0, 0], [40, 0], [60, 0]])
    odds = np.exp(-np.array([0.0, 40, 60]))
    labels = jnp.zeros(3, jnp.int32)
    f = lambda z: cross_entropy(z, labels, reduction="none", **FORWARD)  # noqa: E731
    direction = np.float32([[1, 0]] * 3)
    value, tangent = jax.jit(lambda z: jax.jvp(f, (z,), (direction,)))(logits)
    np.testing.assert_allclose(value, np.log1p(odds), rtol=1e-5)
    np.testing.assert_allclose(tangent, -odds / (1 + odds), rtol=1e-5)


@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
@pytest.mark.parametrize("names", [[], ALONE], ids=["alone", "all options"])
def test_keeps_no_array_of_logits_size_but_the_operands(rng, names, dense):
    """Logits, the mask, dense labels as they came, class weights twice; 8 numbers a token, and 8 more for options."""
    names = [name for name in names if not (dense and name == "ignore_index")]
    logits, labels, options = random_case(rng, (32, 512), -1, jnp.float32, dense, names)
    _, pull = jax.vjp(lambda x: cross_entropy(x, labels, **options), jnp.asarray(logits))
    kept = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(pull))
    operands = logits.nbytes + labels.nbytes * dense
    operands += options["where"].nbytes + 2 * options["class_weights"].nbytes if names else 0
    assert kept <= operands + 32 * 4 * 16  # numbers a token


def test_along_the_labels_alone(rng):
    """Σ_v dt_v (log_normalizer - z_v); the logits have no tangent."""
    logits, labels, _ = random_case(rng, (4, 9), -1, jnp.float32, True, [])
    direction = rng.normal(size=labels.shape).astype(np.float32)
    f = lambda t: cross_entropy(logits, t, reduction="none", **FORWARD)  # noqa: E731
    tangent = jax.jit(lambda t, dt: jax.jvp(f, (t,), (dt,))[1])(labels, direction)
    terms = -direction * np.asarray(jax.nn.log_softmax(np.float64(logits)), np.float64)
    np.testing.assert_allclose(tangent, terms.sum(-1), atol=16 * 1.2e-7 * np.abs(terms).sum(-1).max(), rtol=0)


def test_along_logits_of_which_one_is_infinite_in_a_dense_loss():
    """The loss is inf, and its slope by what is not infinite too; by what has no tangent it is not asked."""
    z, t = np.float32([[0, -np.inf, 0]]), np.float32([[1 / 3] * 3])
    loss = lambda z: cross_entropy(z, t, reduction="none", **FORWARD)[0]  # noqa: E731
    along, gradient = jax.jit(lambda z: (jax.jvp(loss, (z,), (np.float32([[1, 0, 0]]),)), jax.grad(loss)(z)))(z)
    assert along[0] == np.inf
    np.testing.assert_allclose(along[1], gradient[0, 0], rtol=1e-6)


def test_a_function_of_chunks_that_knows_the_axis_it_is_mapped_over(rng):
    x, w, dw = (jnp.float32(rng.normal(size=size)) for size in ((3, 6, 4), (4, 5), (4, 5)))
    labels = rng.integers(0, 5, (3, 6)).astype(np.int32)

    def of_chunk(w, chunk):
        logits = chunk[0] @ w
        return cross_entropy(logits - jax.lax.pmean(logits, "v"), chunk[1], reduction="sum", **FORWARD)

    def along(total, x, labels):
        return jax.jvp(lambda w: total(w, x, labels), (w,), (dw,))[1]

    in_chunks = lambda w, x, y: sum_over_chunks(of_chunk, w, (x.reshape(-1, 2, 4), y.reshape(-1, 2)), **FORWARD)  # noqa: E731
    at_once = lambda w, x, y: of_chunk(w, (x, y))  # noqa: E731
    run = jax.jit(lambda: [jax.vmap(partial(along, f), axis_name="v")(x, labels) for f in (in_chunks, at_once)])
    assert_close(*run())


ROWS = {
    "weights": {"weights": np.float32([1, 2])},
    "where": {"where": np.array([[True, True, True], [True, False, True]])},
    "class weights, an ignored id": {"class_weights": np.float32([1, 2, 3]), "ignore_index": 1},
    "statistics": {"statistics": True},
    "a mapped cap": {"softcap": "mapped"},
    "a mapped scale": {"logit_scale": "mapped"},
}


@pytest.mark.parametrize("name", few_of(list(ROWS), 3))
def test_the_gradient_of_a_mapped_loss(name):
    """Failure 32: its primal and its tangent may be batched differently. As of the losses one by one."""
    x = jnp.arange(6.0).reshape(2, 3)
    rows, numbers, labels = jnp.stack([x, 2 * x]), jnp.array([3.0, 2.0]), jnp.array([1, 2])

    def loss(x, number):
        options = {key: number if isinstance(value, str) else value for key, value in ROWS[name].items()}
        found = cross_entropy(x, labels, **options)
        return found[0] if "statistics" in options else found

    @jax.jit
    def both(rows, numbers):
        mapped = jax.grad(lambda rows: jnp.sum(jax.vmap(loss)(rows, numbers)))(rows)
        return mapped, jnp.stack([jax.grad(loss)(row, number) for row, number in zip(rows, numbers, strict=True)])

    assert_close(*both(rows, numbers))


DOORS = {
    "ids": lambda x, w, y: cross_entropy(x @ w, y),
    "dense": lambda x, w, y: cross_entropy(x @ w, jax.nn.softmax(x @ w * w[:1, :1])),
    "statistics": lambda x, w, y: jnp.sum(label_statistics(x @ w, y).entropy),
    "divergence": lambda x, w, y: kl_divergence(x @ w, teacher_logits=jnp.sin(x @ w)),
    "linear": lambda x, w, y: linear_cross_entropy(x, w, y, chunk_size=1),
    "linear, none": lambda x, w, y: jnp.sum(linear_cross_entropy(x, w, y, chunk_size=1, reduction="none") ** 2),
    "linear statistics": lambda x, w, y: jnp.sum(linear_label_statistics(x, w, y, chunk_size=1).entropy),
    "linear divergence": lambda x, w, y: linear_kl_divergence(x, w, teacher_x=x * x, teacher_weight=w, chunk_size=1),
}


@pytest.mark.nan
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_row_of_weight_0_has_no_part_in_the_heads_gradient(rng, reduction):
    """Failure 45: in reverse mode by the flag, whatever its hidden state holds."""
    x, w = (jnp.float32(rng.normal(size=size)) for size in ((3, 4), (4, 5)))
    y, weights, held = jnp.array([0, 1, 2]), jnp.array([1.0, 0.0, 2.0]), x.at[1, 2].set(jnp.inf)

    def losses(x, w):
        yield linear_cross_entropy(x, w, y, weights=weights, forward_mode=True, reduction=reduction, chunk_size=2)
        more = {"teacher_logits": jnp.zeros((3, 5)), "weights": weights, "reduction": reduction, "chunk_size": 2}
        yield linear_kl_divergence(x, w, **more, forward_mode=True)

    total = lambda x, w: sum(map(jnp.sum, losses(x, w)))  # noqa: E731
    for got, want in zip(jax.grad(total, (0, 1))(held, w), jax.grad(total, (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert all(np.all(np.isfinite(tangent)) for tangent in jax.jvp(total, (held, w), (x, w)))
    plain = lambda w, **how: jnp.sum(linear_cross_entropy(x, w, y, reduction=reduction, **how))  # noqa: E731
    of_all = jax.grad(partial(plain, forward_mode=True, chunk_size=2))(w)
    np.testing.assert_allclose(of_all, jax.grad(plain)(w), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("door", few_of(list(DOORS), 4))
def test_second_derivatives_in_a_loop(rng, door):
    """Failure 33: of a loss that a scan sums, and of a scan whose carry takes gradient steps; as without the loop."""
    x, w = (jnp.float32(rng.normal(size=size)) for size in ((2, 3, 4), (4, 5)))
    y, f = rng.integers(0, 5, (2, 3)).astype(np.int32), DOORS[door]
    along = jnp.float32(rng.normal(size=w.shape))

    def summed(w):
        return jax.lax.scan(lambda total, xy: (total + f(xy[0], w, xy[1]), None), jnp.zeros(()), (x, y))[0]

    def stepped(w):
        step = lambda w, xy: (w - 0.1 * jax.grad(f, 1)(xy[0], w, xy[1]), None)  # noqa: E731
        return f(x[0], jax.lax.scan(step, w, (x, y))[0], y[0])

    def unrolled(w):
        for a, b in zip(x, y, strict=True):
            w = w - 0.1 * jax.grad(f, 1)(a, w, b)
        return f(x[0], w, y[0])

    @jax.jit
    def every(w):
        plainly = lambda w: f(x[0], w, y[0]) + f(x[1], w, y[1])  # noqa: E731
        product = lambda g: jax.jvp(jax.grad(g), (w,), (along,))[1]  # noqa: E731
        again = lambda g: jax.grad(lambda w: jnp.vdot(jax.grad(g)(w), along))(w)  # noqa: E731
        in_loop = product(summed), again(summed), jax.grad(stepped)(w), jax.hessian(summed)(w)
        return in_loop, (product(plainly), again(plainly), jax.grad(unrolled)(w), jax.hessian(plainly)(w))

    assert_close(*every(w))


MAPPED = {
    "weights": ["weights"],
    "weights of dense labels": ["weights", "dense"],
    "weights of few labels": ["weights", "few"],
    "few labels": ["few", "probs"],
    "logits beside class weights": ["logits", "class_weights shared"],
    "a scale beside class weights": ["logit_scale", "class_weights shared"],
    "class weights": ["class_weights"],
    "the smoothing": ["label_smoothing"],
}


@pytest.mark.parametrize("name", few_of(list(MAPPED), 5))
def test_the_gradient_of_a_loss_that_is_mapped_over_some_operands(rng, name):
    """Of what all examples share and of what each has: as of a Python loop, in both modes. (What is not mapped with the
    others JAX counts once for each example, or refuses.)"""
    given = MAPPED[name]
    of = lambda *size: jnp.float32(rng.uniform(0.5, 2, size))  # noqa: E731
    operands = {"logits": jnp.float32(rng.normal(size=(2, 4, 3))), "weights": of(2, 4), "logit_scale": of(2)}
    operands |= {"class_weights": of(2, 3), "label_smoothing": of(2) / 10, "probs": of(2, 4, 2)}
    ids, mapped = rng.integers(0, 3, (4, 2)).astype(np.int32), {name: 0 for name in operands if name in given}
    asked = {"logits", "weights", *(name.split()[0] for name in given)} & set(operands)
    operands = {name: a if name in mapped else a[0] for name, a in operands.items() if name in asked}

    def loss(operands, **how):
        rest = dict(operands)
        logits, probs = rest.pop("logits"), rest.pop("probs", jnp.full((4, 2), 0.3, jnp.float32))
        labels = SparseLabels(ids, probs) if "few" in given else ids[:, 0]
        labels = jax.nn.softmax(jnp.cos(logits)) if "dense" in given else labels
        return jnp.sum(jnp.sin(cross_entropy(logits, labels, reduction="none", **rest, **how)))

    axes = {name: mapped.get(name) for name in operands}
    direction = jax.tree.map(lambda a: jnp.float32(rng.normal(size=a.shape)), operands)

    @jax.jit
    def by_vmap(operands):
        total = lambda o, **how: jnp.sum(jax.vmap(partial(loss, **how), (axes,))(o))  # noqa: E731
        forward = partial(total, **FORWARD)
        along = jax.jvp(forward, (operands,), (direction,))[1]
        product = jax.jvp(jax.grad(total), (operands,), (direction,))[1]
        return jax.grad(total)(operands), jax.grad(forward)(operands), along, product

    def one_by_one(o):
        return sum(loss({n: a[i] if n in mapped else a for n, a in o.items()}) for i in range(2))

    gradient = jax.grad(one_by_one)(operands)
    along = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))
    product = jax.jvp(jax.grad(one_by_one), (operands,), (direction,))[1]
    assert_close(by_vmap(operands), (gradient, gradient, along, product))
