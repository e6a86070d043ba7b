"""Temporary bytes of the compiled programs that make gradients: no array is made, nothing runs."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import linear, logits
from benchmarks.measure import Pace, temporary_bytes
from benchmarks.peers import DENSE, INTEGER, LINEAR, STATISTICS, jax_peers
from benchmarks.subjects import GRADIENT, compiled

Cell = logits.Cell | linear.Cell


def cells(quick: bool) -> list[Cell]:
    return [cell for cell in logits.cells(quick) if cell.passes == GRADIENT] + linear.cells(quick)


def record(cell: Cell, pace: Pace) -> dict[str, Any]:
    """`logits` are the bytes of the logits, which every peer's are set against."""
    del pace
    z = jax.ShapeDtypeStruct((cell.tokens, cell.classes), cell.dtype)
    ids = jax.ShapeDtypeStruct((cell.tokens,), jnp.int32)
    if isinstance(cell, linear.Cell):
        x = jax.ShapeDtypeStruct((cell.tokens, cell.embed), cell.dtype)
        operands, leaves = (x, jax.ShapeDtypeStruct((cell.embed, cell.classes), cell.dtype), ids), 2
    else:
        dense = jax.ShapeDtypeStruct(z.shape, jnp.float32)
        operands, leaves = (z, {INTEGER: ids, STATISTICS: ids, DENSE: dense}.get(cell.what, z)), 1
    what = cell.key()["what"]
    pulled = what not in (INTEGER, STATISTICS, DENSE, LINEAR)
    temporary = {
        name: temporary_bytes(compiled(peer.f, operands, leaves, GRADIENT, pulled, peer.beside))
        for name, peer in jax_peers(what).items()
    }
    return {**cell.key(), "logits": z.size * z.dtype.itemsize, "temporary": temporary}
