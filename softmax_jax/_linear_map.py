"""A linear map whose transpose is written beside it: derivatives in both modes, each by a formula that is exact.

A `custom_vjp` has no forward mode, and of a `custom_jvp` JAX transposes the rule operation by operation: a sum that
leaves one class out becomes a difference of sums, and on the CPU one pass becomes several. So this is a primitive of
its own, whose transpose is itself with the two functions exchanged.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from softmax_jax._sharding import vary, varying

PyTree = Any
Map = Callable[[PyTree, PyTree], PyTree]


class How(NamedTuple):
    """Static: the two functions, and the trees of the operands that stand one after the other."""

    f: Map
    transposed: Map
    given: Any
    inputs: Any
    output: Any

    def turned(self) -> "How":
        return How(self.transposed, self.f, self.given, self.output, self.inputs)

    def split(self, operands: Sequence[Any]) -> list[list[Any]]:
        """Leaves of (given, inputs, output, v)."""
        sizes = [tree.num_leaves for tree in (self.given, self.inputs, self.output, self.inputs)]
        ends = [sum(sizes[: i + 1]) for i in range(4)]
        return [[*operands[end - size : end]] for end, size in zip(ends, sizes, strict=True)]


def linear_map(f: Map, transposed: Map, given: PyTree, inputs: PyTree, output: PyTree, v: PyTree) -> PyTree:
    """f(given, v), linear in v, the tangent of the function that makes `output` of `inputs`; transposed(given, g) has
    the cotangents of `inputs`. Both have derivatives by `given`."""
    v = jax.tree.map(lambda v, a: vary(v, varying(a)), v, inputs)
    (given, at), (inputs, of), (output, to) = map(jax.tree.flatten, (given, inputs, output))
    found = _map.bind(*given, *inputs, *output, *jax.tree.leaves(v), how=How(f, transposed, at, of, to))
    return to.unflatten(found)


def _applied(*operands: Any, how: How) -> list[Any]:
    given, _, _, v = how.split(operands)
    return jax.tree.leaves(how.f(how.given.unflatten(given), how.inputs.unflatten(v)))


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, how: How) -> tuple[list[Any], list[Any]]:
    (given, *types, v), (dgiven, _, _, dv) = how.split(primals), how.split(tangents)
    moving = [i for i, tangent in enumerate(dgiven) if type(tangent) is not ad.Zero]
    types = [leaf for leaves in types for leaf in leaves]

    def by_given(some):
        return _applied(*(some.get(i, leaf) for i, leaf in enumerate(given)), *types, *v, how=how)

    terms = []
    if any(type(tangent) is not ad.Zero for tangent in dv):
        terms.append(_map.bind(*given, *types, *map(ad.instantiate_zeros, dv), how=how))
    if moving:
        some, theirs = ({i: of[i] for i in moving} for of in (given, dgiven))
        terms.append(jax.jvp(by_given, (some,), (theirs,))[1])
    return _map.bind(*primals, how=how), [sum(some[1:], some[0]) for some in zip(*terms, strict=True)]


def _transpose(cotangents: Sequence[Any], *operands: Any, how: How) -> Sequence[Any]:
    given, inputs, output, v = how.split(operands)
    found = _map.bind(*given, *output, *inputs, *map(ad.instantiate_zeros, cotangents), how=how.turned())
    of_v = [g if ad.is_undefined_primal(a) else None for a, g in zip(v, found, strict=True)]
    return [None] * (len(operands) - len(v)) + of_v


def _batched(operands: Sequence[Any], axes: Sequence[int | None], *, how: How) -> tuple[list[Any], list[int]]:
    size = next(a.shape[axis] for a, axis in zip(operands, axes, strict=True) if axis is not None)
    count = how.given.num_leaves
    rest = (batching.bdim_at_front(a, axis, size) for a, axis in zip(operands[count:], axes[count:], strict=True))
    of_all = partial(_of_all, axes=(how.given.unflatten(axes[:count]), 0))
    how = how._replace(f=partial(of_all, how.f), transposed=partial(of_all, how.transposed))
    found = _map.bind(*operands[:count], *rest, how=how)
    return found, [0] * len(found)


def _of_all(f: Map, given: PyTree, v: PyTree, axes: Any) -> PyTree:
    return jax.vmap(f, axes)(given, v)


def _types(*operands: Any, how: How) -> list[Any]:
    return how.split(operands)[2]


_map = Primitive("linear_map")
_map.multiple_results = True
_map.def_impl(_applied)
_map.def_abstract_eval(_types)
mlir.register_lowering(_map, mlir.lower_fun(_applied, multiple_results=True))
ad.primitive_jvps[_map] = _jvp
ad.primitive_transposes[_map] = _transpose
batching.primitive_batchers[_map] = _batched
