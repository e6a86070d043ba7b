"""Optax's doors against Optax and softmax against jax.nn: every door by every kind of mask and of axis that it takes;
last, the loss against autodiff of what everybody writes: log_softmax, then the label's entry.

The formats take turns; only shapes and values are left to chance. The peers are evaluated in float64, on the inputs as
the format rounds them: there their own cancellation is far below what is asked.
"""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_within, epsilon, few_of, loss_and_grad, random_case, random_cotangent, unoptimized

import softmax_jax
from softmax_jax import cross_entropy

INTEGER, DENSE, POLY, SAFE = (
    "softmax_cross_entropy_with_integer_labels",
    "softmax_cross_entropy",
    "poly_loss_cross_entropy",
    "safe_softmax_cross_entropy",
)
SOFTMAXES = ["softmax", "log_softmax"]
FORMATS = [jnp.float32, jnp.bfloat16, jnp.float16]

# Of each door its masks, axes and labels. Optax takes a mask of rows where the axes are named, and not in the poly
# loss; where several axes hold the classes, its integer door takes no mask that broadcasts. Labels that broadcast, and
# integer ones, are tried without a mask.
GRID = [
    (name, masked, axes, labels)
    for name, masks, kinds, of_labels in (
        (INTEGER, ["", "classes", "broadcast", "rows"], ["one", "some"], ["ids"]),
        (DENSE, ["", "classes", "broadcast", "rows"], ["one", "some", "all"], ["own", "one-hot"]),
        (POLY, ["", "classes", "broadcast"], ["one", "some", "all"], ["own", "shared"]),
        (SAFE, [""], ["last"], ["own", "shared"]),
    )
    for masked, axes, labels in product(masks, kinds, of_labels)
    if (masked, axes) != ("rows", "all")
    and (name, masked, axes) != (INTEGER, "broadcast", "some")
    and not (masked and labels in ("shared", "one-hot"))
]


def random_shape_and_axis(rng, kind):
    """(shape, the axis as it is passed, the axes it means): two to four axes, signs by chance, 3 to 125 classes."""
    rank = int(rng.integers(2, 5))
    count = {"one": 1, "last": 1, "some": int(rng.integers(2, min(rank, 3) + 1)), "all": min(rank, 3)}[kind]
    rank = count if kind == "all" else rank
    axes = (rank - 1,) if kind == "last" else tuple(int(a) for a in rng.permutation(rank)[:count])
    sizes = {a: int(rng.choice([3, 5] if count == 1 else [2, 3, 5])) for a in axes}
    shape = tuple(sizes.get(a, int(rng.choice([1, 2, 3, 5]))) for a in range(rank))
    given = tuple(a - rank if rng.random() < 0.5 else a for a in axes)
    return shape, None if kind == "all" else given if kind == "some" else given[0], axes


def random_mask(rng, masked, shape, axes):
    """None; of all entries; of classes, the same ones in all rows; or of the batch's shape. The first row is whole."""
    sizes = {"classes": shape, "broadcast": [n if a in axes else 1 for a, n in enumerate(shape)]}
    if not masked:
        return None
    where = np.asarray(rng.random(sizes.get(masked, [n for a, n in enumerate(shape) if a not in axes])) < 0.6)
    whole = (slice(None) if masked != "rows" and a in axes else 0 for a in range(where.ndim))
    where[tuple(whole)] = True
    return jnp.asarray(where)


def one_hot(labels, shape, axes):
    """Where a flat index into `axes`, in their order, lies in the logits."""
    batch, sizes = [n for a, n in enumerate(shape) if a not in axes], [shape[a] for a in axes]
    hot = (np.arange(np.prod(sizes)) == labels[..., None]).reshape(batch + sizes)
    return np.moveaxis(hot, range(len(batch), hot.ndim), axes) if batch else np.transpose(hot, np.argsort(axes))


def random_logits(rng, shape, dtype):
    """At most 15, for the budget."""
    return jnp.asarray(np.clip(3 * rng.normal(size=shape), -15, 15), dtype)


def results(rng, ours, theirs, operands):
    """(got, want) of the value and of the pullback of a random cotangent, at most 1, to each of `operands`."""
    y = jax.eval_shape(ours, *operands)
    cotangent = np.asarray(rng.uniform(-1, 1, y.shape), y.dtype)

    @partial(jax.jit, static_argnums=0)
    def both(f, *operands):
        y, pull = jax.vjp(f, *operands)
        return y, *pull(jnp.asarray(cotangent, y.dtype))

    got = both(ours, *operands)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        with jax.debug_nans(False), unoptimized():
            want = [np.asarray(w) for w in both(theirs, *(jnp.asarray(a, jnp.float64) for a in operands))]
    assert all(w.dtype == np.float64 for w in want)
    return got, want


# The budgets. A term of the loss is off by at most 2 eps of 1 + |z| + |m| < 32, its label's share, and one of its
# gradient, t_v or T p_v, by as much of its own size: 64 eps of a row's sum of labels T, or twice that; of 1 + |epsilon|
# times T in the poly loss. What is summed over the rows, the gradient of labels that all share or of epsilon, is off by
# the sum.


def in_turn(grid):
    """The cells of a grid, each with the next of the formats."""
    return [(*cell, FORMATS[n % 3]) for n, cell in enumerate(grid)]


def named(value):
    return getattr(value, "__name__", value)


@pytest.mark.diagonal
@pytest.mark.parametrize(("name", "masked", "kind", "of_labels", "dtype"), in_turn(GRID), ids=named)
def test_doors_with_optaxs_names(rng, name, masked, kind, of_labels, dtype):
    shape, axis, axes = random_shape_and_axis(rng, kind)
    logits, where = random_logits(rng, shape, dtype), random_mask(rng, masked, shape, axes)
    batch = tuple(n for a, n in enumerate(shape) if a not in axes)
    ids = rng.integers(0, np.prod([shape[a] for a in axes]), batch)
    operands, mass, rows, integers = [logits], 1.0, 1, ()
    if name == INTEGER:
        integers = (jnp.asarray(ids, rng.choice([np.int32, np.uint8, np.int16])),)
        if where is not None and masked != "rows":
            where = where | jnp.asarray(one_hot(ids, shape, axes))  # hidden labels differ on purpose
    elif of_labels == "one-hot":
        integers = (jnp.asarray(one_hot(ids, shape, axes), jnp.int32),)
    else:
        labels = jnp.asarray(rng.gamma(1.0, size=shape), dtype)
        mass = 1 + float(np.sum(np.float64(labels), axes).max())
        operands.append(labels[0] if of_labels == "shared" else labels)
        rows = shape[0] if of_labels == "shared" else 1
    if name == POLY:
        operands.append(jnp.float32(rng.choice([2.0, -1.0, 0.0])))
        mass, rows = 3 * mass, int(np.prod(batch))

    def door(module, logits, *rest):
        labels = (*rest, *integers)[0]
        if name == POLY:
            return module.poly_loss_cross_entropy(logits, labels, axis=axis, where=where, epsilon=rest[-1])
        return getattr(module, name)(logits, labels, *(() if name == SAFE else (axis, where)))

    got, want = results(rng, partial(door, softmax_jax), partial(door, optax.losses), operands)
    if masked and name != INTEGER:  # to the label of what is hidden, Optax pulls back 0 · -inf
        exists = np.expand_dims(where, axes) if masked == "rows" else where
        want[2] = np.where(exists, want[2], 0)
    for g, w, count in zip(got, want, [1, 2, rows, rows], strict=False):
        assert_within(g, w, count * mass, 64, g.dtype)


@pytest.mark.diagonal
@pytest.mark.parametrize(
    ("name", "masked", "kind", "dtype"),
    [
        *in_turn((f, m, k) for m, k, f in product(["", "classes", "broadcast"], ["one", "some", "all"], SOFTMAXES)),
        # As the same numbers in floats: of integers, jax.nn's shift may wrap and its mask's -inf is cast.
        *((f, "", k, dtype) for f, (k, dtype) in product(SOFTMAXES, [("one", jnp.int32), ("some", jnp.int8)])),
    ],
    ids=named,
)
def test_softmax_and_log_softmax_of_jax_nn(rng, name, masked, kind, dtype):
    shape, axis, axes = random_shape_and_axis(rng, kind)
    where, floating = random_mask(rng, masked, shape, axes), jnp.issubdtype(dtype, jnp.floating)
    x = random_logits(rng, shape, dtype)
    ours = lambda *given: getattr(softmax_jax, name)(*(given or (x,)), axis, where)  # noqa: E731
    theirs = lambda *given: getattr(jax.nn, name)(*(given or (np.float64(x),)), axis, where)  # noqa: E731
    (y, *dx), (p, *dp) = results(rng, ours, theirs, (x,) if floating else ())
    assert_within(y, p, 1.0, 64, y.dtype)
    for got, want in zip(dx, dp, strict=True):
        # Of log_softmax it is g - p Σ g, a sum over the classes. That of softmax starts from y as it is stored, each
        # p_v off by half an eps: p_v (g_v - Σ g p) by three times that of p_v, where |g| ≤ 1.
        classes = np.prod([shape[a] for a in axes])
        stored = 1.5 * epsilon(dtype) / epsilon(jnp.float32) * p / 64
        assert_within(got, want, 1 + classes if name == "log_softmax" else 2 + stored, 64, got.dtype)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name", SOFTMAXES)
def test_jax_nn_refuses_what_is_refused_here(name):
    for x, axis in ((np.float32(1), -1), (np.zeros((4, 7), np.float32), 2), (np.zeros((4, 7), np.float32), (0, -2))):
        for module in (softmax_jax, jax.nn):
            with pytest.raises(ValueError):
                getattr(module, name)(x, axis)


def naive(logits, labels, options):
    axis = options["axis"]
    z = logits.astype(jnp.float32)
    if "logit_scale" in options:
        z = z * options["logit_scale"]
    if "softcap" in options:
        z = options["softcap"] * jnp.tanh(z / options["softcap"])
    log_p = jax.nn.log_softmax(z, axis)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        labels = jax.nn.one_hot(labels, z.shape[axis], axis=axis, dtype=z.dtype)
    c, smoothing = options.get("class_weights", np.ones(z.shape[axis], np.float32)), options.get("label_smoothing", 0)
    c = c.reshape([-1 if a == axis else 1 for a in range(z.ndim)])
    target = jnp.broadcast_to(c, z.shape) * ((1 - smoothing) * labels + smoothing / z.shape[axis])
    log_normalizer = jax.nn.logsumexp(z, axis)
    losses = -jnp.sum(target * log_p, axis) + options.get("z_loss", 0) * log_normalizer**2
    weights = options.get("weights", jnp.ones_like(losses))
    shares = weights * jnp.sum(jnp.broadcast_to(c, z.shape) * labels, axis) if options["shared"] else weights
    reduced = {"none": weights * losses, "sum": jnp.sum(weights * losses)}
    return reduced.get(options["reduction"], jnp.sum(weights * losses) / jnp.sum(shares))


@pytest.mark.diagonal
@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
@pytest.mark.parametrize(
    ("shape", "axis", "reduction"), [((6, 41), -1, "mean"), ((13, 5), 0, "sum"), ((3, 7, 2), 1, "none")], ids=str
)
def test_loss_and_gradient_are_those_of_the_naive_loss(device, rng, shape, axis, reduction, dense):
    dtype = jnp.bfloat16 if axis == 0 else jnp.float32
    names = ["weights", "class_weights", "label_smoothing", "z_loss", "logit_scale", "softcap"]
    logits, labels, options = random_case(rng, shape, axis, dtype, dense, names)
    options["reduction"] = reduction
    cotangent = random_cotangent(rng, shape, axis, reduction)
    loss, grad = loss_and_grad(jax.jit, logits, labels, cotangent, options)
    # Both are computed in float32, then the gradient is rounded once by each.

    @jax.jit
    def both(logits):
        plain, pull = jax.vjp(lambda x: naive(x, jnp.asarray(labels), options | {"shared": not dense}), logits)
        return plain, pull(jnp.asarray(cotangent))[0]

    for got, want in zip((loss, grad), both(logits), strict=True):
        want = np.asarray(want, np.float32)
        # The naive one rounds log_normalizer (≤ 10), so p to 10 eps; times the number of roundings.
        tolerance = 2 * epsilon(got.dtype) + 100 * epsilon(jnp.float32)
        atol = 100 * epsilon(jnp.float32) * abs(want).max()
        np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("dense", few_of([True, False]), ids=["dense", "integer"])
def test_gradients_of_all_operands_are_those_of_the_naive_loss(rng, dense):
    names = ["weights", "class_weights", "label_smoothing", "z_loss", "logit_scale", "softcap"]
    logits, labels, options = random_case(rng, (6, 9), -1, jnp.float32, dense, names)
    options["weights"] = rng.uniform(0.5, 2, 6).astype(np.float32)  # of a weight of 0 only the divisor's part counts
    static, rest = {"axis": 1, "reduction": "mean"}, {k: options[k] for k in names}

    def ours(logits, rest):
        return cross_entropy(logits, labels, **static, **rest)

    def plain(logits, rest):
        return naive(logits, jnp.asarray(labels), static | rest | {"shared": not dense})

    scale = np.float32(rng.normal())
    got, want = (jax.jit(jax.grad(lambda x, r, f=f: scale * f(x, r), (0, 1)))(logits, rest) for f in (ours, plain))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=100 * epsilon(jnp.float32) * abs(w).max())
