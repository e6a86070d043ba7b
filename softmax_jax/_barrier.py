"""An optimization barrier that JAX differentiates: what stands behind it is not made together with what stands before.

Behind it a backward pass makes again what it needs of the operands as they came, as `jax.checkpoint` does: a compiler
would keep it from the forward pass, at the size of the logits (H200, tanh of a softcap: 7 times their bytes, not 3).
"""

from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from softmax_jax._sharding import vary, varying

PyTree = Any


@jax.custom_jvp
def fenced(arrays: PyTree) -> PyTree:
    """An optimization barrier around all of them; around each tangent one of its own, since JAX does not transpose one
    around a tangent beside what is none."""
    return lax.optimization_barrier(arrays)


def _fenced_jvp(primals, tangents):
    """Each of the type of its array behind the barrier: before JAX 0.11 that varies over the devices of all of them."""

    def tangent(array, t):
        if isinstance(t, SymbolicZero) or t.dtype == jax.dtypes.float0:
            return zero_from_primal(array, symbolic_zeros=True)
        return vary(lax.optimization_barrier(t), varying(array))

    arrays = fenced(*primals)
    return arrays, jax.tree.map(tangent, arrays, tangents[0])


fenced.defjvp(_fenced_jvp, symbolic_zeros=True)


def apart(*arrays: PyTree) -> tuple:
    """The same arrays, behind one barrier."""
    return fenced(arrays)
