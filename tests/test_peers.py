"""Optax's doors against Optax and softmax against jax.nn, over a random grid of all their arguments.

Each of the DRAWS draws shapes of rank 1 to 4, an axis or axes of either sign, a mask that broadcasts, one of rows or
none, and dtypes; what the peers compute in 16 bits, or by a difference, is off by a few eps of the largest term.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import epsilon

import softmax_jax

DRAWS = 24
INTEGER = "softmax_cross_entropy_with_integer_labels"
draws = pytest.mark.parametrize("draw", range(DRAWS))


def random_shape(rng):
    return tuple(int(n) for n in rng.choice([1, 2, 3, 5], rng.integers(1, 5)))


def random_axis(rng, rank, none=True):
    """(as it is passed, the axes it means): an int, a tuple, or None for all."""
    kind = rng.choice(["int", "tuple", "none"] if none else ["int", "tuple"])
    if kind == "none":
        return None, tuple(range(rank))
    axes = tuple(int(a) for a in rng.permutation(rank)[: 1 if kind == "int" else rng.integers(1, rank + 1)])
    given = tuple(a - rank if rng.random() < 0.5 else a for a in axes)
    return (given[0] if kind == "int" else given), axes


def random_classes(rng, shape):
    """A mask that broadcasts to `shape`, some of whose axes may be 1."""
    return rng.random([n if rng.random() < 0.7 else 1 for n in shape]) < 0.7


def one_hot(labels, shape, axes):
    """Where a flat index into `axes`, in their order, lies in the logits."""
    batch, sizes = [n for a, n in enumerate(shape) if a not in axes], [shape[a] for a in axes]
    hot = (np.arange(np.prod(sizes)) == labels[..., None]).reshape(batch + sizes)
    return np.moveaxis(hot, range(len(batch), hot.ndim), axes) if batch else np.transpose(hot, np.argsort(axes))


def assert_alike(rng, ours, theirs, x, dtype):
    """Values and, of floating x, pullbacks of a random cotangent. Infinities lie at the same places."""
    operands = (x,) if jnp.issubdtype(x.dtype, jnp.floating) else ()
    cotangent = rng.normal(size=jax.eval_shape(ours, x).shape)

    @partial(jax.jit, static_argnums=0)
    def both(f, *operands):
        y, pull = jax.vjp(lambda *given: f(*(given or (x,))), *operands)
        return y, *pull(jnp.asarray(cotangent, y.dtype))

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"), jax.debug_nans(False):
        want = both(theirs, *operands)
    for a, b in zip(both(ours, *operands), want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        largest = np.max(np.abs(np.where(np.isfinite(b), b, 0)), initial=0)
        np.testing.assert_allclose(a, b, rtol=0, atol=64 * epsilon(dtype) * (1 + largest))


@draws
def test_doors_with_optaxs_names(rng, draw):
    name = rng.choice([INTEGER, "softmax_cross_entropy", "poly_loss_cross_entropy", "safe_softmax_cross_entropy"])
    shape, dtype = random_shape(rng), rng.choice([jnp.float32, jnp.bfloat16, jnp.float16])
    given, axes = random_axis(rng, len(shape), none=name != INTEGER)
    if name.startswith("safe"):
        given, axes = -1, (len(shape) - 1,)
    logits = jnp.asarray(3 * rng.normal(size=shape), dtype)
    batch = tuple(n for a, n in enumerate(shape) if a not in axes)

    ids = rng.integers(0, np.prod([shape[a] for a in axes]), batch)
    labels = ids.astype(rng.choice([np.int32, np.uint8, np.int16]))
    if name == "softmax_cross_entropy" and rng.random() < 0.3:
        labels = one_hot(ids, shape, axes).astype(np.int32)
    elif name != INTEGER:
        labels = jnp.asarray(rng.gamma(1.0, size=shape), rng.choice([jnp.float32, dtype]))
    if name.startswith(("safe", "poly")) and rng.random() < 0.5:
        labels = labels[(0,) * int(rng.integers(0, len(shape)))]  # these two broadcast theirs

    # Optax takes a mask of rows where one axis holds the classes, and not in the poly loss.
    rows = isinstance(given, int) and name != "poly_loss_cross_entropy"
    masked = "" if name.startswith("safe") else rng.choice(["", "classes", "rows"] if rows else ["", "classes"])
    where = None
    if masked == "rows":
        where = rng.random(batch) < 0.6
    elif masked:
        where = np.broadcast_to(random_classes(rng, shape), shape)
        where = where | one_hot(ids, shape, axes) if name == INTEGER else where  # hidden labels differ on purpose

    options = {} if name.startswith("safe") else {"axis": given, "where": None if where is None else jnp.asarray(where)}
    if name.startswith("poly"):
        options["epsilon"] = rng.choice([2.0, -1.0, 0.0])
    ours, theirs = (
        lambda z, m=m: getattr(m, name)(z, jnp.asarray(labels), **options) for m in (softmax_jax, optax.losses)
    )
    assert_alike(rng, ours, theirs, logits, dtype)


@draws
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # jax.nn's, of integers
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_and_log_softmax_of_jax_nn(rng, name, draw):
    shape, dtype = random_shape(rng), rng.choice([jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.int8])
    axis, axes = random_axis(rng, len(shape))
    x = jnp.asarray(3 * np.abs(rng.normal(size=shape)), dtype)
    # jax.nn's maximum of masked integers is at least a cast -inf, and its shift of unsigned ones wraps.
    masked = jnp.issubdtype(dtype, jnp.floating) and rng.random() < 0.7
    where = jnp.asarray(random_classes(rng, shape)) if masked else None
    ours, theirs = (lambda x, m=m: getattr(m, name)(x, axis, where) for m in (softmax_jax, jax.nn))
    assert_alike(rng, ours, theirs, x, dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_jax_nn_refuses_what_is_refused_here(name):
    for x, axis in ((np.float32(1), -1), (np.zeros((4, 7), np.float32), 2), (np.zeros((4, 7), np.float32), (0, -2))):
        for module in (softmax_jax, jax.nn):
            with pytest.raises(ValueError):
                getattr(module, name)(x, axis)
