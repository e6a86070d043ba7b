"""Where the classes of a token lie: on an axis of its arrays, and on devices; entries of an array by its class."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softmax_jax._sharding import Names, count, explicit_mesh, offset


@dataclass(frozen=True)
class Classes:
    """Static. Of arrays that have the classes of this device on their `axis`; ids count from the first of these."""

    axis: int
    over: Names = ()  # the mesh axes that the classes are sharded over; () where every device has all of them

    def of_all(self, like: Array) -> int:
        """How many there are on all devices."""
        return count(like.shape[self.axis], self.over)

    def first(self, like: Array) -> Array | int:
        """Which of all classes is the first of those here."""
        return offset(like.shape[self.axis], self.over)

    def along(self, row: Array) -> Array:
        """A number a token, as one for each of its classes."""
        return jnp.expand_dims(row, self.axis)

    def ids(self, like: Array) -> Array:
        """The class of each entry, in the shape of `like`, and laid out as that is."""
        lies = None if explicit_mesh(like) is None else jax.typeof(like).sharding
        return lax.broadcasted_iota(jnp.int32, like.shape, self.axis, out_sharding=lies)

    def is_at(self, ids: Array, like: Array) -> Array:
        """Whether an entry is at its token's class, in the shape of `like`."""
        return self.ids(like) == self.along(ids)

    def at(self, ids: Array, array: Array) -> Array:
        """The entries at several classes of each token: `ids`, from 0, has them on the axis. Beyond the last class
        stands that one's, so an array of size 1 there is the same for all classes; in any other axis it may have
        size 1."""
        ids = jnp.minimum(ids, array.shape[self.axis] - 1)
        return jnp.take_along_axis(array, ids, self.axis, mode="promise_in_bounds")

    def get(self, ids: Array, array: Array, absent: ArrayLike | None = None) -> Array:
        """The entries at `ids`, of an array of full size in all axes; `absent` stands where an id is none of the
        classes here, of which None says that there is none."""
        others = self._other_axes(array)
        which = lax.GatherDimensionNumbers(
            offset_dims=(),
            collapsed_slice_dims=(self.axis,),
            start_index_map=(self.axis,),
            operand_batching_dims=others,
            start_indices_batching_dims=others,
        )
        sizes, mode = (1,) * array.ndim, "promise_in_bounds" if absent is None else "fill"
        return lax.gather(array, ids[..., None], which, sizes, mode=mode, fill_value=absent)

    def put(self, ids: Array, values: Array, array: Array) -> Array:
        """`array` with `values` at the ids, each id once a token; those that are none of the classes are left out."""
        others = self._other_axes(array)
        where = lax.ScatterDimensionNumbers(
            update_window_dims=(),
            inserted_window_dims=(self.axis,),
            scatter_dims_to_operand_dims=(self.axis,),
            operand_batching_dims=others,
            scatter_indices_batching_dims=others,
        )
        return lax.scatter(array, ids[..., None], values, where, mode=lax.GatherScatterMode.FILL_OR_DROP)

    def _other_axes(self, array: Array) -> tuple[int, ...]:
        return tuple(a for a in range(array.ndim) if a != self.axis)

    def pick(self, ids: Array, array: Array) -> Array:
        """Each token's entry at its class."""
        return jnp.squeeze(self.at(self.along(ids), array), self.axis)

    def if_here(self, read: Callable[[Array], Array], ids: Array, like: Array) -> Array:
        """read(ids), 0 where they are none of the classes here."""
        in_range = jnp.clip(ids, 0, like.shape[self.axis] - 1)
        return jnp.where(in_range == ids, read(in_range), 0)


def classes_last(x: Array, axes: tuple[int, ...]) -> Array:
    """Several class axes as one, the last, flat in the order given (a copy, unless they are the last already)."""
    if len(axes) == 1:
        return x
    batch = tuple(a for a in range(x.ndim) if a not in axes)
    flat = math.prod(x.shape[a] for a in axes)
    return x.transpose(batch + axes).reshape(*(x.shape[a] for a in batch), flat)


def in_parts(a: Array, parts: int, axis: int) -> Array:
    """With the axis as so many equal parts: [.., parts, size, ..]."""
    return a.reshape(*a.shape[:axis], parts, a.shape[axis] // parts, *a.shape[axis + 1 :])


def from_classes_last(y: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """The same several axes again."""
    there = tuple(a for a in range(len(shape)) if a not in axes) + axes
    return y.reshape([shape[a] for a in there]).transpose([there.index(a) for a in range(len(shape))])
