"""Losses over 2 x 4 devices, in each of the ways that JAX has: what is asked, how it lies, how it is run."""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers import FLOATS, epsilon, random_case, unoptimized
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from softmax_jax import cross_entropy, linear_cross_entropy

KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh_of(kind: str, shape=(2, 4), names=("data", "model")):
    return jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(shape))


class Problem(NamedTuple):
    """A loss of arrays by name; the others of its arguments are fixed. What is floating has a gradient."""

    arrays: dict[str, np.ndarray]
    fixed: dict[str, Any]

    def loss(self, arrays, **more):
        arguments = {**arrays, **self.fixed, **more}
        if "logits" in arguments:
            return cross_entropy(arguments.pop("logits"), arguments.pop("labels"), **arguments)
        operands = [arguments.pop(name) for name in ("x", "weight", "labels")]
        return linear_cross_entropy(*operands, **arguments)

    def batch(self):
        return (self.arrays["logits"] if "logits" in self.arrays else self.arrays["x"]).shape[:-1]

    def specs(self, batch: P, classes, embed=None) -> dict[str, P]:
        """How each array lies: its tokens over `batch`, its classes over `classes`, the head's embed over `embed`."""
        tokens = tuple(batch) + (None,) * (len(self.batch()) - len(batch))
        known = {
            "x": P(*tokens),
            "weight": P(classes, embed) if self.fixed.get("transpose_weight") else P(embed, classes),
            "bias": P(classes),
            "class_weights": P(classes),
        }

        def spec(name, array):
            if name in known:
                return known[name]
            if array.ndim == 0:
                return P()
            entries = (*tokens, classes) if array.ndim > len(tokens) else tokens
            return P(*(entry if size > 1 else None for entry, size in zip(entries, array.shape, strict=True)))

        return {name: spec(name, array) for name, array in self.arrays.items()}


def problem(rng, shape, dense=False, names=(), embed=None, bias=True, **fixed) -> Problem:
    """Random arrays and options for logits of `shape`, or for `embed` hidden units and a head."""
    logits, labels, options = random_case(rng, shape, dense=dense, names=names)
    del options["axis"]
    fixed = {**{name: options.pop(name) for name in ("ignore_index",) if name in options}, **fixed}
    arrays = {"labels": labels, **options}
    if embed is None:
        return Problem({"logits": logits, **arrays}, fixed)
    x = rng.normal(size=(*shape[:-1], embed)).astype(np.float32)
    weight = (2 * rng.normal(size=(embed, shape[-1])) / np.sqrt(embed)).astype(np.float32)
    weight = weight.T if fixed.get("transpose_weight") else weight
    arrays |= {"bias": rng.normal(size=shape[-1]).astype(np.float32)} if bias else {}
    return Problem({"x": x, "weight": weight, **arrays}, fixed)


def cancelling(rng, name: str) -> Problem:
    """Parts of d(name) that all but cancel between devices: a hundredth of each is left. bfloat16 parts would leave an
    error of a tenth of that; every factor is exact in bfloat16, so that parts in float32 leave the last rounding."""
    asked = problem(rng, (8, 16, 64), embed=40, bias=False, chunk_size=16, reduction="sum")
    x, weight = (np.zeros_like(asked.arrays[name]) for name in ("x", "weight"))
    kept = x if name == "weight" else weight.T  # the other is 0, so that all probabilities are 1/64
    half = len(kept) // 2
    kept[:half] = rng.normal(size=kept[:half].shape).astype(jnp.bfloat16)
    kept[half:] = -kept[:half] * (1 + 2.0**-6 * rng.integers(0, 2, kept[:half].shape))
    weight[:, 63] = 0
    arrays = {"x": jnp.asarray(x, jnp.bfloat16), "weight": jnp.asarray(weight, jnp.bfloat16)}
    labels = np.full((8, 16), 63, np.int32)
    return asked._replace(arrays={**asked.arrays, **arrays, "labels": labels})


def assert_summed_in_float32(got, asked: Problem, name: str):
    wide = {key: np.asarray(a, np.float32) if a.dtype == jnp.bfloat16 else a for key, a in asked.arrays.items()}
    want = truth(asked._replace(arrays=wide), 1.0)[1][name]
    assert got.dtype == jnp.bfloat16
    parts = 128 if name == "weight" else 2  # about Σ |x| of the tokens, or Σ |weight| / 64
    error = np.abs(np.asarray(got, np.float64) - want)
    assert np.all(error <= 2.0**-8 * np.abs(want) + 8 * epsilon(jnp.float32) * parts), name


def _differentiated(loss, arrays, cotangent):
    floats = {name: a for name, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    value, pull = jax.vjp(lambda floats: loss({**arrays, **floats}), floats)
    return value, pull(cotangent.astype(value.dtype))[0]


def truth(asked: Problem, cotangent):
    """Value and gradients of the same door on one device, in float64."""
    wide = {name: a.astype(np.float64) if a.dtype == np.float32 else a for name, a in asked.arrays.items()}
    with jax.enable_x64(True), unoptimized():
        fixed = tuple(sorted(asked.fixed.items()))
        value, gradients = _of_one_device(wide, np.float64(cotangent), fixed)
    return np.asarray(value), {name: np.asarray(g) for name, g in gradients.items()}


@partial(jax.jit, static_argnums=2)  # one for all tests: equal problems compile once
def _of_one_device(arrays, cotangent, fixed):
    return _differentiated(Problem(arrays, dict(fixed)).loss, arrays, cotangent)


def placed(asked: Problem, mesh, specs):
    return {name: jax.device_put(a, NamedSharding(mesh, specs[name])) for name, a in asked.arrays.items()}


def under_jit(asked: Problem, mesh, specs, cotangent):
    """(value and gradients, compiled program) of arrays that lie over the mesh by their specs."""
    with jax.set_mesh(mesh):
        arrays = placed(asked, mesh, specs)
        f = jax.jit(lambda arrays: _differentiated(asked.loss, arrays, np.float32(cotangent)))
        program = f.lower(arrays).compile()
        return program(arrays), program


def under_shard_map(asked: Problem, mesh, specs, cotangent, tokens="data", check_vma=True, outside=True, **more):
    """The same by `shard_map` with `axis_name`, the gradient taken outside of it or inside; "sum" is over the tokens of
    all devices. `more` goes to the loss."""
    reduction = asked.fixed.get("reduction", "mean")

    def loss(arrays):
        value = asked.loss(arrays, **more)
        return value if reduction == "none" else lax.psum(value, tokens)

    out = P(*specs["logits" if "logits" in specs else "x"][:-1]) if reduction == "none" else P()
    cotangent = np.float32(cotangent)

    def whole(arrays, cotangent):
        if outside:
            mapped = jax.shard_map(loss, mesh=mesh, in_specs=(specs,), out_specs=out, check_vma=check_vma)
            return _differentiated(mapped, arrays, cotangent)
        floats = {name: specs[name] for name, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
        inside = lambda arrays, cotangent: _differentiated(loss, arrays, cotangent)  # noqa: E731
        in_specs, outs = (specs, out), (out, floats)
        return jax.shard_map(inside, mesh=mesh, in_specs=in_specs, out_specs=outs, check_vma=check_vma)(
            arrays, cotangent
        )

    program = jax.jit(whole).lower(asked.arrays, cotangent).compile()
    return program(asked.arrays, cotangent), program


def assert_equal(got, want, k=64):
    """Every number within k eps of the largest of its array. A sum of n terms in another order is off by at most n
    eps/2 of their sizes; what goes wrong over devices is off by a whole term or a whole factor. A scalar option's
    gradient is one sum over all logits, of either sign."""
    for name, truth in {"loss": want[0], **want[1]}.items():
        number = np.asarray(got[0] if name == "loss" else got[1][name], np.float64)
        finite = np.isfinite(truth)
        np.testing.assert_array_equal(number[~finite], truth[~finite], name)
        terms = k if np.ndim(truth) else 8 * k
        budget = terms * epsilon(jnp.float32) * np.max(np.abs(truth), initial=1e-30, where=finite)
        np.testing.assert_allclose(number[finite], truth[finite], rtol=0, atol=budget, err_msg=name)


class Collective(NamedTuple):
    op: str
    largest: int  # the number of elements of its largest result, on one device
    bytes: int  # of all its results
    in_loop: bool


def collectives(program) -> list[Collective]:
    """What a compiled program moves between devices."""
    found, entry = [], False
    for line in program.as_text().splitlines():
        if line and not line[0].isspace():
            entry = line.startswith("ENTRY")
        match = re.search(r"= (.*?) (all-\w+|collective-\w+|reduce-scatter|ragged-\S+)(?:-start)?\(", line)
        if match and not _within_one_device(line):
            shapes = re.findall(r"(?:pred|[a-z]+(\d+))\[([\d,]*)\]", match[1])
            sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for _, shape in shapes]
            total = sum(size * int(bits or 8) // 8 for size, (bits, _) in zip(sizes, shapes, strict=True))
            found.append(Collective(match[2], max(sizes), total, not entry))
    return found


def _within_one_device(line: str) -> bool:
    """A reduction over a mesh axis of size 1 moves nothing; XLA drops it later, or runs it as a copy."""
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return all(sizes[name] == "1" for name in re.findall(r"'(\w+)'", named[2]))
    return re.search(r"replica_groups=\{\{\d+\}", line) is not None


OPTIONS = ("where", "weights", "class_weights", *FLOATS)
