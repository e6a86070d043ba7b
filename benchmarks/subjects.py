"""A loss and its operands become a subject: compiled, on the device, ready to run forward alone or with gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.measure import Subject, gpu
from benchmarks.peers import Peer, found_torch

FORWARD, GRADIENT = "forward", "forward + gradient"
SPINNING = 0.02  # seconds for which OpenMP's threads wait for work on a core that the next subject needs


def with_gradients(f: Callable, leaves: int, pulled: bool, beside: bool) -> Callable:
    """f and its gradients in its first `leaves` operands; if `pulled`, of the cotangent that comes last. Of a loss with
    more `beside` it, that too."""

    def run(*operands):
        operands, cotangent = (operands[:-1], operands[-1]) if pulled else (operands, None)
        y, pull, *more = jax.vjp(lambda *z: f(*z, *operands[leaves:]), *operands[:leaves], has_aux=beside)
        return y, pull(jnp.ones_like(y) if cotangent is None else cotangent), more

    return run


def compiled(
    f: Callable, operands: Sequence[Any], leaves: int, passes: str, pulled: bool = False, beside: bool = False
):
    """The program of f for these operands, arrays or shapes."""
    g = f if passes == FORWARD else with_gradients(f, leaves, pulled, beside)
    return jax.jit(g).lower(*operands).compile()


def of_jax(peer: Peer, leaves: Sequence[Array], rest: Sequence[Array], passes: str, cotangent: Array | None) -> Subject:
    operands = (*leaves, *rest, *([] if cotangent is None else [cotangent]))
    program = compiled(peer.f, operands, len(leaves), passes, cotangent is not None, peer.beside)
    return Subject(lambda: program(*operands))


def of_torch(
    peer: Peer, leaves: Sequence[Array], rest: Sequence[Array], passes: str, cotangent: Array | None
) -> Subject:
    """On the same memory, unless the peer overwrites it. The gradients are dropped with the results, as JAX's are."""
    torch = found_torch()
    z = [torch.from_dlpack(leaf) for leaf in leaves]
    z = [(leaf.clone() if peer.overwrites else leaf).requires_grad_(passes == GRADIENT) for leaf in z]
    others = [torch.from_dlpack(operand) for operand in rest]
    others = [operand if operand.is_floating_point() else operand.long() for operand in others]
    dy = None if cotangent is None else torch.from_dlpack(cotangent)

    def forward():
        with torch.no_grad():
            return peer.f(*z, *others)

    def both():
        y = peer.f(*z, *others)
        y.backward(dy)
        gradients = [leaf.grad for leaf in z]
        for leaf in z:
            leaf.grad = None
        return y, gradients

    run = forward if passes == FORWARD else both
    return Subject(run, lambda _: torch.cuda.synchronize()) if gpu() else Subject(run, lambda _: None, SPINNING)
