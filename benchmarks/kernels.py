"""The kernels of a program that XLA compiled for a GPU, read off its text: what each moves and computes; and what XLA's
own count of a TPU's has too much."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class Kernel(NamedTuple):
    times: int  # how often it runs
    moved: int  # bytes read and written, each time
    operations: int  # of matrix products, each time


SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota", "opt-barrier", "after-all"}
Line = tuple[str, str, str, str]  # name, type, operation, what follows
Bodies = dict[str, list[Line]]


def kernels(text: str) -> Iterator[Kernel]:
    bodies, entry = computations(text)
    yield from kernels_of(entry, 1, bodies)


def computations(text: str) -> tuple[Bodies, str]:
    """(the lines of each computation, the name of the first)."""
    bodies, entry, name = {}, "", ""
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line):
            name, bodies[head[2]] = head[2], []
            entry = name if head[1] else entry
        elif found := re.match(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", line):
            bodies[name].append(found.groups())
    return bodies, entry


def kernels_of(name: str, times: int, bodies: Bodies) -> Iterator[Kernel]:
    types = {result: shape for result, shape, _, _ in bodies[name]}
    for _, shape, op, rest in bodies[name]:
        if op in FREE or op.endswith("-done") or '"AllocateBuffer"' in rest:
            continue
        if op in ("while", "conditional", "call"):
            body, trips = (re.search(p, rest) for p in (r"(?:body|to_apply)=%?([\w.\-]+)", r'count"?:\{"n":"(\d+)"'))
            if body is None or op != "call" and trips is None:
                raise ValueError(f"the bytes of a program with this {op!r} depend on its run. Give one without.")
            yield from kernels_of(body[1], times * (int(trips[1]) if trips else 1), bodies)
            continue
        called = re.search(r"calls=%?([\w.\-]+)", rest)
        if called and called[1] in bodies:
            body = bodies[called[1]]
            read, written = sum(read_of(line, body) for line in body), written_by(shape, body)
            yield Kernel(times, read + written, sum(operations_of(line, body) for line in body))
        else:
            read = sum(map(size_of, (types.get(o, "") for o in re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))))
            written = min(size_of(shape), read) if op.endswith("-start") else size_of(shape)
            yield Kernel(times, read + written, 0)


def size_of(shapes: str) -> int:
    """Bytes of all the arrays that a piece of a program's text names."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    return sum(SIZES[d] * math.prod(int(n) for n in s.split(",") if n) for d, s in found if d in SIZES)


def uses_of(name: str, body: list[Line]) -> list[Line]:
    return [line for line in body if re.search(rf"%{re.escape(name)}\b", line[3].split("metadata")[0])]


def updated(line: Line) -> list[str]:
    """The names of a dynamic-update-slice's operands: the whole, the part, indices."""
    return re.findall(r"%([\w.\-]+)", line[3]) if line[2] == "dynamic-update-slice" else []


def read_of(line: Line, body: list[Line]) -> int:
    """What a fused kernel reads of one operand: of those that it indexes, the entries; nothing of one that it only
    writes a part of, in place."""
    name, shape, op, _ = line
    if op != "parameter":
        return 0
    uses = uses_of(name, body)
    if uses and all(updated(use)[:1] == [name] for use in uses):
        return 0
    indexed = uses and all(use[2] in ("dynamic-slice", "gather", "slice") for use in uses)
    return sum(size_of(use[1]) for use in uses) if indexed else size_of(shape)


def written_by(shape: str, body: list[Line]) -> int:
    """What a fused kernel writes: where it updates a part of an operand in place, that part."""
    types = {name: of for name, of, _, _ in body}
    operands = {name for name, _, op, _ in body if op == "parameter"}
    parts = [updated(line) for line in body]
    in_place = [types[names[1]] for names in parts if names and names[0] in operands]
    return sum(map(size_of, in_place)) if in_place else size_of(shape)


def operations_of(line: Line, body: list[Line]) -> int:
    """2 · the length of the sums · the number of results, of a matrix product."""
    _, shape, op, rest = line
    if op != "dot":
        return 0
    sizes = lambda shapes: [int(n) for n in re.findall(r"\[([\d,]*)\]", shapes)[0].split(",") if n]  # noqa: E731
    types = {name: of for name, of, _, _ in body}
    left = sizes(types[re.findall(r"%([\w.\-]+)", rest)[0]])
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
    axes = [int(a) for a in summed[1].split(",") if a] if summed else []
    return 2 * math.prod(sizes(shape)) * math.prod(left[a] for a in axes)


GATHER = re.compile(r"gather_offload\S* = \(\((\w+\[[\d,]*\]).*?\), \w+\[([\d,]*)\].* custom-call-update\(")
GRANULE = 32
"""Bytes that a sparse core reads of the memory at once (a v5p or v6e, `dma_granule_size_bytes` of JAX's `TpuInfo`)."""


def overcounted(text: str) -> int:
    """Bytes that `cost_analysis` of a TPU's program has too much: of a gather that is left to the sparse cores it
    counts the whole array, twice. They read a granule for each number, from where the array lies."""
    found = [
        (size_of(whole), math.prod(int(n) for n in shape.split(",") if n)) for whole, shape in GATHER.findall(text)
    ]
    return sum(max(0, 2 * whole - GRANULE * numbers) for whole, numbers in found)
