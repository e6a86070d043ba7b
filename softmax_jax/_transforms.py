"""What JAX has to be told: what is not kept from the forward pass, which tangents there are, what is mapped."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from softmax_jax._devices import PyTree, vary, varying


def barrier(*arrays: PyTree) -> tuple:
    """The same arrays, behind one optimization barrier: what stands behind it is not made together with what stands
    before. There a backward pass makes again what it needs of the operands as they came, as `jax.checkpoint` does: a
    compiler would keep it from the forward pass, at the size of the logits (H200, tanh of a softcap: 7 times their
    bytes, not 3)."""
    return _fenced(arrays)


@jax.custom_jvp
def _fenced(arrays: PyTree) -> PyTree:
    """An optimization barrier around all of them; around each tangent one of its own, since JAX does not transpose one
    around a tangent beside what is none."""
    return lax.optimization_barrier(arrays)


def _fenced_jvp(primals: tuple, tangents: tuple) -> tuple:
    """Each of the type of its array behind the barrier: before JAX 0.11 that varies over the devices of all of them."""

    def tangent(array: Array, t: Any) -> Any:
        if isinstance(t, SymbolicZero) or t.dtype == jax.dtypes.float0:
            return zero_from_primal(array, symbolic_zeros=True)
        return vary(lax.optimization_barrier(t), varying(array))

    arrays = _fenced(*primals)
    return arrays, jax.tree.map(tangent, arrays, tangents[0])


_fenced.defjvp(_fenced_jvp, symbolic_zeros=True)


def tangent_of(f: Callable, operands: PyTree, tangents: PyTree) -> PyTree:
    """The tangent of f(operands) in a rule with `symbolic_zeros`, by the operands that have one."""
    leaves, tree = jax.tree.flatten(operands)
    moving = {i: t for i, t in enumerate(tree.flatten_up_to(tangents)) if not isinstance(t, SymbolicZero)}

    def of_moving(some: dict[int, Array]) -> PyTree:
        return f(tree.unflatten([some.get(i, leaf) for i, leaf in enumerate(leaves)]))

    return jax.jvp(of_moving, ({i: leaves[i] for i in moving},), (moving,))[1]


def keeping_its_rule(f: Callable) -> Callable:
    """f, which has a `custom_jvp`, where the forward pass of a `custom_vjp` calls it. JAX 0.10 forgets a rule that is
    called there, under `scan`, when it is differentiated again; under a checkpoint it keeps it."""
    return jax.checkpoint(f, prevent_cse=False) if jax.__version_info__ < (0, 11) else f


@custom_vmap
def batch_all_or_none(numbers: PyTree) -> PyTree:
    """The same numbers, of which `vmap` maps all or none: of a function with a rule JAX takes the cotangent of a result
    that is not mapped for one that all examples share, once for each of them (0.10), or refuses it."""
    return numbers


@batch_all_or_none.def_vmap
def _(size: int, mapped: list, numbers: PyTree) -> tuple[PyTree, PyTree]:
    def of_all(a: Array, is_mapped: bool) -> Array:
        return a if is_mapped else jnp.broadcast_to(a[None], (size, *a.shape))

    return jax.tree.map(of_all, numbers, *mapped), jax.tree.map(lambda _: True, numbers)
