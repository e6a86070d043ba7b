"""Entries of an array by the class of each token, and several class axes as one."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._adjustment import Adjustment, adjust
from softmax_jax._dtypes import upcast
from softmax_jax._sharding import Names, offset, psum


def is_at(pivot: Array, like: Array, axis: int) -> Array:
    """Whether an entry is at its token's pivot class, in the shape of `like`."""
    return lax.broadcasted_iota(jnp.int32, like.shape, axis) == jnp.expand_dims(pivot, axis)


def at_ids(array: Array, ids: Array, axis: int) -> Array:
    """The entries at several classes of each token: `ids`, from 0, has them on `axis`. Beyond the last class stands
    that one's, so an array of size 1 there is the same for all classes; in any other axis it may have size 1."""
    return jnp.take_along_axis(array, jnp.minimum(ids, array.shape[axis] - 1), axis, mode="promise_in_bounds")


def with_at_ids(array: Array, ids: Array, values: Array, axis: int) -> Array:
    """`array` with `values` at the ids, each id once a token; those out of range are left out."""
    others = tuple(a for a in range(array.ndim) if a != axis)
    where = lax.ScatterDimensionNumbers(
        update_window_dims=(),
        inserted_window_dims=(axis,),
        scatter_dims_to_operand_dims=(axis,),
        operand_batching_dims=others,
        scatter_indices_batching_dims=others,
    )
    return lax.scatter(array, ids[..., None], values, where, mode=lax.GatherScatterMode.FILL_OR_DROP)


def pick(array: Array, ids: Array, axis: int) -> Array:
    """Each token's entry at class `ids`."""
    return jnp.squeeze(at_ids(array, jnp.expand_dims(ids, axis), axis), axis)


def if_here(read: Callable[[Array], Array], ids: Array, size: int) -> Array:
    """read(ids), 0 where they are none of the `size` classes here."""
    in_range = jnp.clip(ids, 0, size - 1)
    return jnp.where(in_range == ids, read(in_range), 0)


def pick_logit(logits: Array, ids: Array, adjustment: Adjustment, axis: int) -> Array:
    """Each token's z at class `ids`: the logit is read raw and adjusted by itself."""
    where = None if adjustment.where is None else pick(adjustment.where, ids, axis)
    return upcast(adjust(pick(logits, ids, axis), adjustment._replace(where=where)))


def pick_of_all(logits: Array, ids: Array, adjustment: Adjustment, axis: int, class_axes: Names) -> Array:
    """`pick_logit` at ids of all devices' classes; 0 for what is none of them."""
    size = logits.shape[axis]
    read = lambda ids: pick_logit(logits, ids, adjustment, axis)  # noqa: E731
    return psum(if_here(read, ids - offset(size, class_axes), size), class_axes)


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
