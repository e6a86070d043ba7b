"""An optimization barrier that JAX differentiates: what stands behind it is not made together with what stands before.

Behind it a backward pass makes again what it needs of the operands as they came, as `jax.checkpoint` does: a compiler
would keep it from the forward pass, at the size of the logits (H200, tanh of a softcap: 7 times their bytes, not 3).
"""

from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero

PyTree = Any


@jax.custom_jvp
def fenced(arrays: PyTree) -> PyTree:
    """An optimization barrier around all of them; around each tangent one of its own, since JAX does not transpose one
    around a tangent beside what is none."""
    return lax.optimization_barrier(arrays)


def _fenced_jvp(primals, tangents):
    is_one = lambda t: not isinstance(t, SymbolicZero) and t.dtype != jax.dtypes.float0  # noqa: E731
    each = jax.tree.map(lambda t: lax.optimization_barrier(t) if is_one(t) else t, tangents[0])
    return fenced(*primals), each


fenced.defjvp(_fenced_jvp, symbolic_zeros=True)


def apart(*arrays: PyTree) -> tuple:
    """The same arrays, behind one barrier."""
    return fenced(arrays)
