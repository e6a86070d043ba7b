"""The formulas of docs/scaling.md against compiled programs of 1, 2, 4 and 8 simulated devices."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import scaling_formulas
from helpers import few_of
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import collectives, mesh_of

from softmax_jax import linear_cross_entropy
from softmax_jax._sums import blocks

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.compiled

SCALARS = 64  # bytes: the loss


def compiled(step: scaling_formulas.Step, dtype):
    specs = {"x": P("data"), "weight": P(None, "model"), "labels": P("data")}
    shapes = {"x": (step.tokens, step.embed), "weight": (step.embed, step.classes), "labels": (step.tokens,)}
    mesh = mesh_of("automatic", (step.data, step.model))
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.int32 if name == "labels" else dtype, sharding=NamedSharding(mesh, specs[name]))
        for name, shape in shapes.items()
    ]

    def loss(x, weight, labels):
        how = {"axis_name": "model", "normalizer": step.tokens, "chunk_size": step.chunk}
        return lax.psum(linear_cross_entropy(x, weight, labels, **how), "data")

    mapped = jax.shard_map(loss, mesh=mesh, in_specs=tuple(specs.values()), out_specs=P())
    return jax.jit(jax.value_and_grad(mapped, (0, 1))).lower(*arrays).compile()


@pytest.mark.diagonal
@pytest.mark.parametrize("dtype", few_of([jnp.float32, jnp.bfloat16]), ids=lambda d: d.__name__)
@pytest.mark.parametrize("mesh", few_of([(2, 4), (2, 1), (1, 2), (2, 2), (8, 1)]), ids=str)
def test_bytes_that_are_moved(mesh, dtype):
    step = scaling_formulas.Step(1024, 64, 4096, *mesh, chunk=1024 // mesh[0] // 4, itemsize=jnp.dtype(dtype).itemsize)
    moved = collectives(compiled(step, dtype))
    assert {found.op for found in moved} == {"all-reduce"}
    total = sum(found.bytes * (4 if found.in_loop else 1) for found in moved)
    formula = step.per_token_moved() + step.dx_moved() + step.dweight_moved()
    assert formula <= total <= formula + SCALARS


@pytest.mark.cpu_compiler
@pytest.mark.parametrize("mesh", few_of([(2, 4), (1, 1), (1, 2), (2, 2)]), ids=str)
def test_temporary_bytes(mesh):
    """Of float32; the CPU's products of bfloat16 make float32 copies of their operands besides."""
    step = scaling_formulas.Step(1024, 64, 4096, *mesh, chunk=128, itemsize=4)
    temporary = compiled(step, jnp.float32).memory_analysis().temp_size_in_bytes
    block = 4 * min(blocks.BLOCK, step.chunk * step.classes // mesh[1])  # without the label's logit
    assert step.chunk_bytes() <= temporary <= 1.02 * (step.chunk_bytes() + step.sums_bytes() + block)


def test_table_is_the_one_that_the_formulas_give():
    lines = (ROOT / "docs/scaling.md").read_text().splitlines()
    rows = [line for line in lines if re.match(r"\| (8|64|1024) \|", line)]
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in rows] == scaling_formulas.table()
