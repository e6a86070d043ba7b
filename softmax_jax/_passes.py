"""One pass over the classes at a time: what a token's sums are made of.

Each pass reads the logits as they came and makes z - m again. That is the same number only up to rounding: where the
logits are a product made in the same program, a compiler may take a · b - m in one step, and z - m at the maximum is
then not 0. So nothing here or above asks whether it is.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._adjustment import Adjustment, adjust, shifted
from softmax_jax._dtypes import upcast
from softmax_jax._sharding import Names, count, offset, pmin

PyTree = Any


def apart(*arrays: Array) -> tuple[Array, ...]:
    """The same arrays, fenced off from what made them.

    XLA on the CPU would otherwise share one float32 copy of 16-bit logits between the maximum, the sum and the
    gradient: 2x the logits' bytes; without it the gradient is 1.5x faster.
    """
    return lax.optimization_barrier(arrays)


def alone(f: Callable[..., PyTree], *operands: PyTree) -> PyTree:
    """f(*operands), fenced off from what made them and from what is made of it: for a pass over the classes.

    XLA on the CPU fuses a row sum with the arithmetic that feeds it alone. What feeds two of them, be it a constant, it
    writes out at the size of the logits (0.12: two sums of 4096 x 8192 took 170 ms together and 15 ms each by itself);
    and it fuses a row sum with the mean over rows that follows (4096 x 32000: 970 ms instead of 90 ms).
    """
    return lax.optimization_barrier(f(*lax.optimization_barrier(operands)))


def over_classes(reduce: Callable, f: Callable, logits: Array, m: Array, adjustment: Adjustment, axis: int) -> Callable:
    """(*operands) -> the sum, or another `reduce`, of f(z - m, *operands) over the classes here."""

    def of_fenced(logits, m, *operands):
        return reduce(f(shifted(logits, adjustment, m, axis), *operands), axis)

    return partial(alone, of_fenced, logits, m)


# Between the logits and their sum stands floating-point arithmetic alone: at an integer, a comparison or a select
# within a row sum, XLA on the CPU writes the whole array out (3-6x slower).


def distance(pivot: Array, like: Array, axis: int) -> Array:
    """|v - pivot|: 0 at each token's pivot class and at least 1 elsewhere, in the shape and dtype of `like`."""
    ids = _ids(like, axis)
    return jnp.abs(ids - jnp.expand_dims(pivot, axis).astype(ids.dtype)).astype(like.dtype)


def _ids(z: Array, axis: int) -> Array:
    """The class of every entry, in z's dtype where that is exact: up to 2**24 classes in float32."""
    exact = z.shape[axis] <= 2**24
    return lax.broadcasted_iota(z.dtype if exact else jnp.int32, z.shape, axis)


@jax.custom_jvp
def times(factor: Array, z: Array) -> Array:
    """factor · z, but 0 where the factor is 0 and z = -inf: z is bounded from below, by 0 where the factor is 0 and by
    -inf where it is a normal number."""
    large = factor * 3e38
    return factor * jnp.maximum(z, large * large * -3e38)


@times.defjvp
def _times_jvp(primals, tangents):
    (factor, z), (dfactor, dz) = primals, tangents
    return times(factor, z), dfactor * finite(z, factor == 0) + factor * dz


def finite(z: Array, unused: Array) -> Array:
    """z, but 0 where it is infinite and `unused`."""
    return jnp.where(jnp.isinf(z) & unused, 0, z)


def sum_of_others(logits: Array, m: Array, pivot: Array, adjustment: Adjustment, axis: int) -> Array:
    """Σ_{v≠pivot} exp(z_v - m), in which no term is larger than 1."""
    others = lambda z, pivot: jnp.minimum(jnp.exp(z), 2 * distance(pivot, z, axis))  # noqa: E731
    return over_classes(jnp.sum, others, logits, m, adjustment, axis)(pivot)


def top_class(logits: Array, m: Array, adjustment: Adjustment, axis: int, class_axes: Names = ()) -> Array:
    """The first of all classes whose z is the maximum, or within 1 (and a few roundings) of it, which serves as well:
    the maximum is then among the others, and their sum no tail. The number of classes for a row that has none."""
    size = logits.shape[axis]
    nearly = m - 1 - 16 * jnp.finfo(m.dtype).eps * jnp.abs(m)

    def candidates(below):
        beyond = jnp.minimum(jnp.minimum(below * -1e38, 4) * 1e38, size)  # ≤ 0 at a candidate, `size` elsewhere
        return jnp.maximum(_ids(below, axis), beyond.astype(_ids(below, axis).dtype))

    first = over_classes(jnp.min, candidates, logits, nearly, adjustment, axis)()
    first = jnp.where(first < size, first, size).astype(jnp.int32)
    return pmin(jnp.where(first < size, first + offset(size, class_axes), count(size, class_axes)), class_axes)


def pick(array: Array, ids: Array, axis: int) -> Array:
    """Each token's entry at class `ids`, which must lie in range; `array` may have size 1 in any other axis."""
    if array.shape[axis] == 1:
        return jnp.squeeze(array, axis)
    return jnp.squeeze(jnp.take_along_axis(array, jnp.expand_dims(ids, axis), axis, mode="promise_in_bounds"), axis)


def pick_logit(logits: Array, ids: Array, adjustment: Adjustment, axis: int) -> Array:
    """Each token's z at class `ids`: the logit is read raw and adjusted by itself."""
    where = None if adjustment.where is None else pick(adjustment.where, ids, axis)
    return upcast(adjust(pick(logits, ids, axis), adjustment._replace(where=where)))


def classes_last(x: Array, axes: tuple[int, ...]) -> Array:
    """Several class axes as one, the last, flat in the order given (a copy, unless they are the last already)."""
    if len(axes) == 1:
        return x
    batch = tuple(a for a in range(x.ndim) if a not in axes)
    flat = math.prod(x.shape[a] for a in axes)
    return x.transpose(batch + axes).reshape(*(x.shape[a] for a in batch), flat)


def from_classes_last(y: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """The same several axes again."""
    there = tuple(a for a in range(len(shape)) if a not in axes) + axes
    return y.reshape([shape[a] for a in there]).transpose([there.index(a) for a in range(len(shape))])
