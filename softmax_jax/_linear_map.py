"""A linear map whose transpose is written beside it: derivatives in both modes, each by a formula that is exact.

A `custom_vjp` has no forward mode, and of a `custom_jvp` JAX transposes the rule operation by operation: a sum that
leaves one class out becomes a difference of sums, and on the CPU one pass becomes several. So this is a primitive of
its own, whose transpose is itself with the two functions exchanged.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from softmax_jax._sharding import vary, varying

Map = Callable[[Any, Array], Array]


def linear_map(f: Map, transposed: Map, given: Any, v: Array) -> Array:
    """f(given, v), linear in v, of whose shape and dtype it and its transpose are. Both have derivatives by `given`."""
    leaves, tree = jax.tree.flatten(given)
    return _map.bind(*leaves, vary(v, varying(given)), f=f, transposed=transposed, tree=tree)


def _applied(*operands: Any, f: Map, transposed: Map, tree: Any) -> Array:
    *leaves, v = operands
    return f(tree.unflatten(leaves), v)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **how: Any) -> tuple[Array, Array]:
    (*given, v), (*dgiven, dv) = primals, tangents
    moving = [i for i, tangent in enumerate(dgiven) if type(tangent) is not ad.Zero]

    def by_given(some):
        return _applied(*(some.get(i, leaf) for i, leaf in enumerate(given)), v, **how)

    terms = [] if type(dv) is ad.Zero else [_map.bind(*given, dv, **how)]
    if moving:
        some, theirs = ({i: of[i] for i in moving} for of in (given, dgiven))
        terms.append(jax.jvp(by_given, (some,), (theirs,))[1])
    return _map.bind(*primals, **how), sum(terms[1:], terms[0])


def _transpose(cotangent: Array, *operands: Any, f: Map, transposed: Map, tree: Any) -> Sequence[Array | None]:
    *given, _ = operands
    return [None] * len(given) + [_map.bind(*given, cotangent, f=transposed, transposed=f, tree=tree)]


def _batched(operands: Sequence[Any], axes: Sequence[int | None], *, f: Map, transposed: Map, tree: Any):
    *given, v = operands
    (size,) = {a.shape[axis] for a, axis in zip(operands, axes, strict=True) if axis is not None}
    of_all = partial(_of_all, axes=(tree.unflatten(axes[:-1]), 0))
    v = batching.bdim_at_front(v, axes[-1], size)
    return _map.bind(*given, v, f=partial(of_all, f), transposed=partial(of_all, transposed), tree=tree), 0


def _of_all(f: Map, given: Any, v: Array, axes: Any) -> Array:
    return jax.vmap(f, axes)(given, v)


_map = Primitive("linear_map")
_map.def_impl(_applied)
_map.def_abstract_eval(lambda *operands, **_: operands[-1])
mlir.register_lowering(_map, mlir.lower_fun(_applied, multiple_results=False))
ad.primitive_jvps[_map] = _jvp
ad.primitive_transposes[_map] = _transpose
batching.primitive_batchers[_map] = _batched
