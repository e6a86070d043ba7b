"""What crosses devices.

Inside `shard_map` the classes may lie on several devices: `names` are the mesh axes that they are sharded over, ()
where every device has all of them. A token's maximum and its sums are then combined over those axes, and nothing else
moves.

    m = pmax m_local        sums = psum sums_local        class v of this device = class v + offset of all

Under `check_vma=True` (the default) the type of an array says over which mesh axes it varies. An operand that is the
same on all devices has a gradient that is the sum of theirs, and `same_on_devices` takes that sum: in float32, once.

In explicit sharding the type of an array says how it is laid out. There `over_devices` puts the same computation into
a `shard_map` of that layout. In automatic sharding the compiler finds it all by itself.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any
Names = tuple[str, ...]


def largest(local: Array, names: Names) -> Array:
    """Has no gradient."""
    return lax.pmax(lax.stop_gradient(local), names) if names else local


def smallest(local: Array, names: Names) -> Array:
    """Has no gradient."""
    return lax.pmin(lax.stop_gradient(local), names) if names else local


def total(local: PyTree, names: Names) -> PyTree:
    return lax.psum(local, names) if names else local


def offset(size: int, names: Names) -> Array | int:
    """The first of this device's classes, of which it has `size`."""
    return lax.axis_index(names) * size if names else 0


def count(size: int, names: Names) -> int:
    """The number of classes on all devices."""
    return size * lax.axis_size(names) if names else size


# Manual axes: what varies over which of them.


def varying(*trees: PyTree) -> Names:
    """The mesh axes over which any of the arrays varies."""
    over = frozenset[str]().union(*(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(trees)))
    return tuple(sorted(over))


def checks_varying(names: Names) -> bool:
    """Whether types tell what varies: `shard_map` with check_vma=True."""
    return not names or set(names) <= set(varying(lax.axis_index(names)))


def vary(tree: PyTree, over: Names) -> PyTree:
    """The same arrays, marked as varying over those axes too. Where one did not, its gradient is summed over them."""

    def mark(leaf):
        missing = tuple(name for name in over if name not in varying(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)


def token_axes(names: Names, *trees: PyTree) -> Names:
    """The mesh axes that the arrays vary over, but for those of the classes: those that the tokens are spread over."""
    return tuple(name for name in varying(trees) if name not in names)


def vary_alike(*trees: PyTree) -> PyTree:
    return vary(trees, varying(trees))


def same_on_devices(gradient: Array, operand: Array) -> Array:
    """`gradient` summed over the mesh axes over which `operand` does not vary."""
    return total(gradient, tuple(name for name in varying(gradient) if name not in varying(operand)))


def zeros_as(kind: Any) -> Array:
    """Zeros of the shape, the dtype and the devices that `kind`, the type of an array, tells."""
    return vary(jnp.zeros(kind.shape, kind.dtype), tuple(kind.mat.varying))


def empty_as(array: Array) -> Array:
    """Nothing of an array but its dtype, and over which devices it varies."""
    return vary(jnp.zeros((0,), array.dtype), varying(array))


# Automatic sharding: the compiler's choice, from what the operands tell it.


def buffer_for(array: Array) -> Array:
    """Zeros that lie where `array` does, to sum or to collect its gradient in.

    Without that word the compiler may lay the gradient of activations out as the head is, and gather logits for it. A
    choice that is never made gives it: the compiler does not see through the barrier before it has laid all out.
    """
    return jnp.where(lax.optimization_barrier(False), array, jnp.zeros_like(array))


# Explicit sharding: types that tell how an array is laid out.


def explicit_mesh(*trees: PyTree) -> Mesh | AbstractMesh | None:
    """The mesh that any of the arrays is laid out over explicitly."""
    shardings = (jax.typeof(leaf).sharding for leaf in jax.tree.leaves(trees))
    return next((s.mesh for s in shardings if any(entry is not None for entry in s.spec)), None)


def entries_of(array: Array) -> tuple[Names, ...]:
    """The mesh axes that each axis of an array is laid out over."""
    spec = jax.typeof(array).sharding.spec
    return tuple(() if entry is None else entry if isinstance(entry, tuple) else (entry,) for entry in spec)


def fit(array: Array | None, entries: tuple[Names, ...]) -> Any:
    """The PartitionSpec of an array that broadcasts to axes that are laid out over `entries`; None for None."""
    if array is None:
        return None
    last = entries[len(entries) - array.ndim :]
    sizes = zip(array.shape, last, strict=True)
    return PartitionSpec(*(entry if size > 1 and entry else None for size, entry in sizes))


def over_devices(f: Callable, mesh: Mesh | AbstractMesh, operands: tuple, specs: tuple, out: PartitionSpec) -> Array:
    """f of each device's part of the operands, once they are laid out by `specs`."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    manual, explicit = ({name for name in kinds if kinds[name] == k} for k in (AxisType.Manual, AxisType.Explicit))
    if manual:  # JAX 0.12 cannot lower the gradient of a shard_map within a shard_map over other axes.
        raise ValueError(
            f"arrays are laid out explicitly over {sorted(explicit)} inside a `jax.shard_map` over {sorted(manual)} "
            "alone. Let that one take all axes of the mesh (leave out its `axis_names`), or none."
        )
    put = lambda array, spec: jax.sharding.reshard(array, NamedSharding(mesh, spec))  # noqa: E731
    on_device = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, axis_names=explicit)
    return on_device(*jax.tree.map(put, operands, specs))
