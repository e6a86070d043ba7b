"""A linear map whose transpose is written beside it: derivatives in both modes, each by a formula that is exact.

A `custom_vjp` has no forward mode, and of a `custom_jvp` JAX transposes the rule operation by operation: a sum that
leaves one class out becomes a difference of sums, and on the CPU one pass becomes several. So this is a primitive of
its own, whose transpose is itself with the two functions exchanged.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from softmax_jax._sharding import PyTree, vary, varying

Map = Callable[[PyTree, PyTree], PyTree]
Places = tuple[int, ...]  # of leaves of a pytree
Leaves = dict[int, Any]  # those, by their place


class Side(NamedTuple):
    """Of v, or of what becomes of it."""

    tree: Any
    types: tuple[Any, ...]


class How(NamedTuple):
    """Static: the two functions, and what the operands are: the leaves of `given`, then those of v."""

    f: Map
    transposed: Map
    given: Any
    source: Side
    target: Side

    def turned(self) -> "How":
        return How(self.transposed, self.f, self.given, self.target, self.source)

    def of(self, used: Sequence[bool]) -> "How":
        """For those of the results alone: None stands for the others."""
        if all(used):
            return self
        types = tuple(kind for kind, one in zip(self.target.types, used, strict=True) if one)
        tree = jax.tree.structure(_only(used, self.target.tree.unflatten(used)))
        return self._replace(f=partial(_some, self.f, used), target=Side(tree, types))

    def split(self, operands: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        count = self.given.num_leaves
        return [*operands[:count]], [*operands[count:]]


def linear_map(f: Map, transposed: Map, given: PyTree, inputs: PyTree, output: PyTree, v: PyTree) -> PyTree:
    """f(given, v), linear in v: of the types of `output`, as v is of those of `inputs`, of which nothing but their
    types is used. transposed(given, g) is its transpose. For an array of g, or then of v, that is known to be 0 stands
    None. Both have derivatives by `given`."""
    v = jax.tree.map(lambda v, a: vary(v, varying(a)), v, inputs)
    (given, tree), source, target = jax.tree.flatten(given), _side(inputs), _side(output)
    found = _map.bind(*given, *jax.tree.leaves(v), how=How(f, transposed, tree, source, target))
    return target.tree.unflatten(found)


def _side(arrays: PyTree) -> Side:
    leaves, tree = jax.tree.flatten(arrays)
    return Side(tree, tuple(map(jax.typeof, leaves)))


def _applied(*operands: Any, how: How) -> list[Any]:
    given, v = how.split([*map(jnp.asarray, operands)])  # zeros may be NumPy's
    return jax.tree.leaves(how.f(how.given.unflatten(given), how.source.tree.unflatten(v)))


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, how: How) -> tuple[list[Any], list[Any]]:
    (given, v), (dgiven, dv) = how.split(primals), how.split(tangents)
    some = [i for i, tangent in enumerate(dgiven) if type(tangent) is not ad.Zero]

    def by_given(inputs):
        return _applied(*(inputs.get(i, leaf) for i, leaf in enumerate(given)), *v, how=how)

    terms = []
    if any(type(tangent) is not ad.Zero for tangent in dv):
        terms.append(_map.bind(*given, *map(ad.instantiate_zeros, dv), how=how))
    if some:
        inputs, dinputs = ({i: of[i] for i in some} for of in (given, dgiven))
        terms.append(jax.jvp(by_given, (inputs,), (dinputs,))[1])
    return _map.bind(*primals, how=how), [sum(of_one[1:], of_one[0]) for of_one in zip(*terms, strict=True)]


def _transpose(cotangents: Sequence[Any], *operands: Any, how: How) -> Sequence[Any]:
    given, v = how.split(operands)
    used = [type(cotangent) is not ad.Zero for cotangent in cotangents]
    g = [cotangent for cotangent, one in zip(cotangents, used, strict=True) if one]
    found = _map.bind(*given, *g, how=how.of(used).turned())
    of_v = [g if ad.is_undefined_primal(a) else None for a, g in zip(v, found, strict=True)]
    return [None] * len(given) + of_v


def _batched(
    axis: Any, operands: Sequence[Any], axes: Sequence[int | None], *, how: How
) -> tuple[list[Any], list[int | None]]:
    (given, v), (given_axes, v_axes) = how.split(operands), how.split(axes)
    entries = [jax.typeof(a).sharding.spec[i] for a, i in zip(operands, axes, strict=True) if i is not None]
    if not entries:
        return _map.bind(*operands, how=how), [None] * len(how.target.types)
    entry = entries[0]
    v = [_at_front(a, i, axis.size, entry) for a, i in zip(v, v_axes, strict=True)]
    of_all = partial(_mapped, (how.given.unflatten(given_axes), 0), axis.name, axis.spmd_name)
    how = how._replace(f=partial(of_all, how.f), transposed=partial(of_all, how.transposed))
    front = partial(_at_front, axis=None, size=axis.size, entry=entry)
    of_each = jax.make_jaxpr(partial(jax.tree.map, front))(how.target.types)
    source = how.source._replace(types=tuple(map(jax.typeof, v)))
    how = how._replace(source=source, target=how.target._replace(types=tuple(of_each.out_avals)))
    return _map.bind(*given, *v, how=how), [0] * len(how.target.types)


def _at_front(a: Any, axis: int | None, size: int, entry: Any) -> Array:
    """With the batch, which lies over the mesh axes `entry`, in front."""
    if axis is not None:
        return jnp.moveaxis(a, axis, 0)
    lies = None if entry is None else PartitionSpec(entry, *jax.typeof(a).sharding.spec)
    return lax.broadcast_in_dim(a, (size, *a.shape), tuple(range(1, a.ndim + 1)), out_sharding=lies)


def _mapped(axes: Any, name: Any, spmd_name: Any, f: Map, given: PyTree, v: PyTree) -> PyTree:
    return jax.vmap(f, axes, axis_name=name, spmd_axis_name=spmd_name)(given, v)


def _some(f: Map, used: Sequence[bool], given: PyTree, v: PyTree) -> PyTree:
    return _only(used, f(given, v))


def _only(used: Sequence[bool], tree: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([leaf if one else None for leaf, one in zip(leaves, used, strict=True)])


def _types(*_: Any, how: How) -> tuple[Any, ...]:
    return how.target.types


_map = Primitive("linear_map")
_map.multiple_results = True
_map.def_impl(_applied)
_map.def_abstract_eval(_types)
mlir.register_lowering(_map, mlir.lower_fun(_applied, multiple_results=True))
ad.primitive_jvps[_map] = _jvp
ad.primitive_transposes[_map] = _transpose
batching.fancy_primitive_batchers[_map] = _batched


# For rules of several operands, of which those are linear that have a tangent.


def moving(primals: PyTree, tangents: PyTree) -> tuple[Leaves, Leaves]:
    """(the leaves that have a tangent, their tangents), in a rule with `symbolic_zeros`."""
    leaves, tree = jax.tree.flatten(primals)
    found = {i: t for i, t in enumerate(tree.flatten_up_to(tangents)) if not isinstance(t, SymbolicZero)}
    return {i: leaves[i] for i in found}, found


def tangent_of(f: Callable, operands: PyTree, dinputs: Leaves) -> PyTree:
    """The tangent of f(operands), by that of some leaves; None is 0."""
    dinputs = {i: tangent for i, tangent in dinputs.items() if tangent is not None}
    of_inputs, inputs = _of_leaves(f, operands, dinputs)
    return jax.jvp(of_inputs, (inputs,), (dinputs,))[1]


def gradients_of(f: Callable, operands: PyTree, places: Iterable[int], cotangent: dict[str, Any]) -> Leaves:
    """The gradients of the leaves at those places, by those results of f(operands), a dict, that there are."""
    of_inputs, inputs = _of_leaves(f, operands, places)
    found, pull = jax.vjp(of_inputs, inputs)
    return pull({name: cotangent[name] for name in found})[0]


def _of_leaves(f: Callable, operands: PyTree, places: Iterable[int]) -> tuple[Callable, Leaves]:
    """(f as a function of the leaves at those places, the leaves)."""
    leaves, tree = jax.tree.flatten(operands)

    def of_leaves(some):
        return f(tree.unflatten([some.get(i, leaf) for i, leaf in enumerate(leaves)]))

    return of_leaves, {i: leaves[i] for i in places}


def at_places(places: Places, operands: PyTree, gradients: PyTree) -> Leaves:
    """The gradients of the leaves at those places."""
    leaves = jax.tree.structure(operands).flatten_up_to(gradients)
    return {i: leaves[i] for i in places}
