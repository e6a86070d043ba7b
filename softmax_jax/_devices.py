"""What crosses devices, and where the classes of a token lie: on an axis of its arrays, and on which devices.

Inside `shard_map` the classes may lie on several devices, sharded over mesh axes. A token's maximum and its sums are
then combined over those axes, and nothing else moves.

    m = pmax m_local        sums = psum sums_local        class v of this device = class v + offset of all

Under `check_vma=True` (the default) the type of an array says over which mesh axes it varies. An operand that is the
same on all devices has a gradient that is the sum of theirs, and `sum_over_sharing_devices` takes that sum: in float32,
once.

In explicit sharding the type of an array says how it is laid out. There `on_each_device` puts the same computation into
a `shard_map` of that layout. In automatic sharding the compiler finds it all by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

PyTree = Any
AxisNames = tuple[str, ...]


def pmax(local: Array, axes: AxisNames) -> Array:
    """The largest over the mesh axes; has no gradient."""
    local = lax.stop_gradient(local)
    return lax.pmax(local, axes) if axes else local


def pmin(local: Array, axes: AxisNames) -> Array:
    """The smallest over the mesh axes; has no gradient."""
    return -pmax(-local, axes)


def psum(local: PyTree, axes: AxisNames) -> PyTree:
    return lax.psum(local, axes) if axes else local


def offset(size: int, axes: AxisNames) -> Array | int:
    """The first of this device's items, of which each device along the mesh axes has `size`."""
    return lax.axis_index(axes) * size if axes else 0


def count(size: int, axes: AxisNames) -> int:
    """The number of items of all devices along the mesh axes."""
    return size * lax.axis_size(axes) if axes else size


# Manual axes: what varies over which of them.


def varying(*trees: PyTree) -> AxisNames:
    """The mesh axes over which any of the arrays varies."""
    over = frozenset[str]().union(*(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(trees)))
    return tuple(sorted(over))


def checks_varying(axes: AxisNames) -> bool:
    """Whether types tell what varies: `shard_map` with check_vma=True."""
    return not axes or set(axes) <= set(varying(lax.axis_index(axes)))


def check_gradient(class_axes: AxisNames) -> None:
    """That JAX can tell a gradient that all devices share."""
    if not checks_varying(class_axes):
        raise ValueError(
            f"the derivative over axis_name={class_axes} needs `jax.shard_map(..., check_vma=True)`, its default: "
            "without it, as under `jax.vmap` and `jax.pmap`, JAX does not tell a cotangent that every device has from "
            "one that is spread over them: a gradient would be wrong by the number of devices. Take it under that."
        )


def mesh_axes(axis_name: Any) -> AxisNames:
    """`axis_name`, a name, several or None, as the tuple of mesh axes that the classes are sharded over."""
    axes = () if axis_name is None else tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    if len(set(axes)) != len(axes):
        raise ValueError(f"`axis_name` names a mesh axis twice: {axis_name!r}. Name each axis once.")
    try:
        checks_varying(axes)
    except (NameError, TypeError, ValueError, KeyError):
        raise ValueError(
            f"`axis_name` must name mesh axes of the `jax.shard_map` around the call; got {axis_name!r}. Call it "
            "inside one, or leave `axis_name` out: under `jit` sharded classes need none."
        ) from None
    return axes


def check_sharded(name: str, array: PyTree, class_axes: AxisNames) -> None:
    """That `array` holds each device's own classes."""
    same = [axis for axis in class_axes if axis not in varying(array)]
    if same and checks_varying(class_axes):
        raise ValueError(
            f"`{name}` is the same on every device along {same}, yet axis_name={class_axes} says that its classes are "
            f"sharded there. Give `{name}` an in_spec that names {same}, or leave `axis_name` out."
        )


def vary(tree: PyTree, over: AxisNames) -> PyTree:
    """The same arrays, marked as varying over those axes too. Where one did not, its gradient is summed over them."""

    def mark(leaf: Array) -> Array:
        missing = tuple(name for name in over if name not in varying(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)


def vary_alike(*trees: PyTree) -> PyTree:
    return vary(trees, varying(trees))


def sum_over_sharing_devices(gradient: Array, operand: Array) -> Array:
    """`gradient` summed over the mesh axes over which `operand` does not vary."""
    return psum(gradient, tuple(name for name in varying(gradient) if name not in varying(operand)))


def zeros_as(kind: Any) -> Array:
    """Zeros of the shape, the dtype and the devices that `kind`, the type of an array, tells."""
    return vary(jnp.zeros(kind.shape, kind.dtype), tuple(kind.mat.varying))


# Automatic sharding: the compiler's choice, from what the operands tell it.


def buffer_for(array: Array) -> Array:
    """Zeros that lie where `array` does, to sum or to collect its gradient in.

    Without that word the compiler may lay the gradient of activations out as the head is, and gather logits for it. A
    choice that is never made gives it: the compiler does not see through the barrier before it has laid all out.
    """
    return jnp.where(lax.optimization_barrier(False), array, jnp.zeros_like(array))


def laid_out_by_compiler() -> bool:
    """Whether the compiler chooses how arrays lie over devices, of which there are several."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() > 1 if mesh.empty else any(kind != AxisType.Manual for kind in mesh.axis_types)


def unwritten(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """An array that is written before it is read. Zeros where the compiler chooses how arrays lie over devices: it does
    not divide one that it knows nothing of (8192 tokens of 128256 classes over 8 devices: 2004 MiB instead of 250)."""
    # JAX 0.10 takes an empty array for one that `vmap` has mapped.
    zeros = laid_out_by_compiler() or jax.__version_info__ < (0, 11)
    return jnp.zeros(shape, dtype) if zeros else lax.empty(shape, dtype)


# Explicit sharding: types that tell how an array is laid out.


def explicit_mesh(*trees: PyTree) -> Mesh | AbstractMesh | None:
    """The mesh that any of the arrays is laid out over explicitly."""
    shardings = (jax.typeof(leaf).sharding for leaf in jax.tree.leaves(trees))
    return next((s.mesh for s in shardings if any(entry is not None for entry in s.spec)), None)


def mesh_axes_of(array: Array) -> tuple[AxisNames, ...]:
    """The mesh axes that each axis of an array is laid out over."""
    spec = jax.typeof(array).sharding.spec
    return tuple(() if entry is None else entry if isinstance(entry, tuple) else (entry,) for entry in spec)


def partition_spec(entries: tuple[AxisNames, ...]) -> PartitionSpec:
    return PartitionSpec(*(entry or None for entry in entries))


def broadcast_spec(array: Array | None, entries: tuple[AxisNames, ...]) -> Any:
    """The PartitionSpec of an array that broadcasts to axes that are laid out over `entries`; None for None."""
    if array is None:
        return None
    last = entries[len(entries) - array.ndim :]
    return partition_spec(tuple(entry if size > 1 else () for size, entry in zip(array.shape, last, strict=True)))


def on_each_device(f: Callable, mesh: Mesh | AbstractMesh, operands: tuple, specs: tuple, out: PyTree) -> PyTree:
    """f of each device's part of the operands, once they are laid out by `specs`."""
    axes = {kind: [n for n, k in zip(mesh.axis_names, mesh.axis_types, strict=True) if k == kind] for kind in AxisType}
    if axes[AxisType.Manual]:
        # JAX 0.10 and 0.12 cannot lower the gradient of a shard_map within a shard_map over other axes.
        raise ValueError(
            f"arrays are laid out explicitly over {axes[AxisType.Explicit]} inside a `jax.shard_map` over "
            f"{axes[AxisType.Manual]} alone. Let that one take all axes of the mesh (leave out `axis_names`), or none."
        )
    # By default all axes that no vmap around has taken; those of the compiler's choice stay the compiler's.
    some: dict[str, Any] = {"axis_names": set(axes[AxisType.Explicit])} if axes[AxisType.Auto] else {}
    on_device = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, **some)
    return on_device(*jax.tree.map(lambda a, spec: jax.sharding.reshard(a, NamedSharding(mesh, spec)), operands, specs))


# Where the classes of a token lie.


@dataclass(frozen=True)
class Classes:
    """Static. Of arrays that have the classes of this device on their `axis`; ids count from the first of these."""

    axis: int
    over: AxisNames = ()  # the mesh axes that the classes are sharded over; () where every device has all of them

    def num_classes(self, like: Array) -> int:
        """How many there are on all devices."""
        return count(like.shape[self.axis], self.over)

    def first_id(self, like: Array) -> Array | int:
        """Which of all classes is the first of those here."""
        return offset(like.shape[self.axis], self.over)

    def expand(self, row: Array) -> Array:
        """A number a token, as one for each of its classes."""
        return jnp.expand_dims(row, self.axis)

    def ids(self, like: Array) -> Array:
        """The class of each entry, in the shape of `like`, and laid out as that is."""
        lies = None if explicit_mesh(like) is None else jax.typeof(like).sharding
        return lax.broadcasted_iota(jnp.int32, like.shape, self.axis, out_sharding=lies)

    def one_hot(self, ids: Array, like: Array) -> Array:
        """Whether an entry is at its token's class, in the shape of `like`."""
        return self.ids(like) == self.expand(ids)

    def take(self, ids: Array, array: Array) -> Array:
        """The entries at several classes of each token: `ids`, from 0, has them on the axis. Beyond the last class
        stands that one's, so an array of size 1 there is the same for all classes; in any other axis it may have
        size 1."""
        ids = jnp.minimum(ids, array.shape[self.axis] - 1)
        return jnp.take_along_axis(array, ids, self.axis, mode="promise_in_bounds")

    def gather(self, ids: Array, array: Array, absent: ArrayLike | None = None) -> Array:
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

    def scatter(self, ids: Array, values: Array, array: Array) -> Array:
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

    def take_one(self, ids: Array, array: Array) -> Array:
        """Each token's entry at its class."""
        return jnp.squeeze(self.take(self.expand(ids), array), self.axis)

    def read_local(self, read: Callable[[Array], Array], ids: Array, like: Array) -> Array:
        """read(ids), 0 where they are none of the classes here."""
        in_range = jnp.clip(ids, 0, like.shape[self.axis] - 1)
        return jnp.where(in_range == ids, read(in_range), 0)
