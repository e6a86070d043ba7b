"""What a program costs a GPU or a TPU that is not here.

JAX compiles for a device that is only described. The text of the compiled program says exactly which kernels run and
which arrays each of them reads and writes; only their time is unknown.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding


class Gpu(NamedTuple):
    """What its maker says of it."""

    name: str
    capability: tuple[int, int]
    cores: int
    memory: int  # bytes
    bandwidth: float  # of the memory, bytes/s
    clock: float  # GHz
    l2: int  # bytes
    shared: int  # bytes of a core
    rate: float  # of large bfloat16 matrix products as published, operations/s


GPUS = {
    "H200": Gpu("NVIDIA H200 141GB HBM3e", (9, 0), 132, 151_397_597_184, 4.8e12, 1.98, 52_428_800, 233_472, 790e12),
    "H100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 84_942_979_072, 3.352e12, 1.98, 52_428_800, 233_472, 700e12),
    "B200": Gpu("NVIDIA B200", (10, 0), 148, 191_000_000_000, 7.7e12, 1.965, 132_644_864, 233_472, 1500e12),
    "A100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 85_100_000_000, 2.039e12, 1.41, 41_943_040, 167_936, 260e12),
}
TPUS = {"TPU v5e": "v5e:2x2", "TPU v5p": "v5p:2x2x1", "TPU v6e": "v6e:2x2"}
DEVICES = [*GPUS, *TPUS]


def description(gpu: Gpu) -> str:
    """Describes a GPU in the words of XLA's compiler."""
    accelerated = "" if gpu.capability[0] < 9 else "feature_extension: ACCELERATED_FEATURES"
    return f"""gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
      shared_memory_per_core: {gpu.shared} threads_per_core_limit: 2048 core_count: {gpu.cores} fpus_per_core: 128
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {int(gpu.bandwidth)} l2_cache_size: {gpu.l2} clock_rate_ghz: {gpu.clock}
      device_memory_size: {gpu.memory} shared_memory_per_block_optin: {gpu.shared - 1024}
      cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} {accelerated} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{gpu.name}" """


class Cost(NamedTuple):
    kernels: int | None  # None where the compiler does not tell
    moved: float  # in units of the table
    temporary: float  # in units of the table
    milliseconds: float | None  # a roofline: each kernel at 90 % of the bandwidth or at the rate of matrix products


def cost(device: str, f: Callable, operands: list[jax.ShapeDtypeStruct], unit: int) -> Cost:
    """Compiles `f` for one device. Bytes are in units of so many."""
    if device in GPUS:
        target: dict[str, Any] = {"target_config": description(GPUS[device]), "topology": "1x1x1"}
        topology = topologies.get_topology_desc("none", platform="cuda", **target)
    else:
        topology = topologies.get_topology_desc(TPUS[device], platform="tpu")
    sharding = SingleDeviceSharding(topology.devices[0])
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in operands]
    platform = "cuda" if device in GPUS else "tpu"
    program: Any = jax.jit(f).trace(*placed).lower(lowering_platforms=(platform,)).compile()
    temporary = program.memory_analysis().temp_size_in_bytes / unit
    if device in TPUS:
        moved = program.cost_analysis()["bytes accessed"] - overcounted(program.as_text())
        return Cost(None, moved / unit, temporary, None)
    gpu, found = GPUS[device], list(kernels(1, *computations(program.as_text())))
    seconds = sum(k.times * max(k.moved / (0.9 * gpu.bandwidth), k.operations / gpu.rate) for k in found)
    moved = sum(k.times * k.moved for k in found)
    return Cost(sum(k.times for k in found), moved / unit, temporary, 1e3 * seconds)


# The kernels of a GPU's program, read off its text.


class Kernel(NamedTuple):
    times: int  # how often it runs
    moved: int  # bytes read and written, each time
    operations: int  # of matrix products, each time


BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota", "opt-barrier", "after-all"}
Line = tuple[str, str, str, str]  # name, type, operation, what follows
Bodies = dict[str, list[Line]]


def computations(text: str) -> tuple[Bodies, str]:
    """Returns the lines of each computation, and the name of the one that is run."""
    bodies, entry, name = {}, "", ""
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line):
            name, bodies[head[2]] = head[2], []
            entry = name if head[1] else entry
        elif found := re.match(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", line):
            bodies[name].append(found.groups())
    return bodies, entry


def kernels(times: int, bodies: Bodies, name: str) -> Iterator[Kernel]:
    """The kernels of one computation, which runs so many times, and of the loops in it."""
    types = {result: shape for result, shape, _, _ in bodies[name]}
    for _, shape, op, rest in bodies[name]:
        if op in FREE or op.endswith("-done") or '"AllocateBuffer"' in rest:
            continue
        if op in ("while", "conditional", "call"):
            body, trips = (re.search(p, rest) for p in (r"(?:body|to_apply)=%?([\w.\-]+)", r'count"?:\{"n":"(\d+)"'))
            if body is None or op != "call" and trips is None:
                raise ValueError(f"the bytes of a program with this {op!r} depend on its run. Give one without.")
            yield from kernels(times * (int(trips[1]) if trips else 1), bodies, body[1])
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


def integers(text: str) -> list[int]:
    """The sizes in "8192,128256"."""
    return [int(number) for number in text.split(",") if number]


def size_of(shapes: str) -> int:
    """Bytes of all the arrays that a piece of a program's text names."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    return sum(BYTES[dtype] * math.prod(integers(shape)) for dtype, shape in found if dtype in BYTES)


def uses_of(name: str, body: list[Line]) -> list[Line]:
    return [line for line in body if re.search(rf"%{re.escape(name)}\b", line[3].split("metadata")[0])]


def updated(line: Line) -> list[str]:
    """The names of a dynamic-update-slice's operands: the whole, the part, indices."""
    return re.findall(r"%([\w.\-]+)", line[3]) if line[2] == "dynamic-update-slice" else []


def read_of(line: Line, body: list[Line]) -> int:
    """What a fused kernel reads of one operand: only the entries if it indexes the operand, and nothing if it only
    writes a part of it, in place."""
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
    types = {name: of for name, of, _, _ in body}
    left = types[re.findall(r"%([\w.\-]+)", rest)[0]]
    result, left = (integers(re.findall(r"\[([\d,]*)\]", of)[0]) for of in (shape, left))
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
    return 2 * math.prod(result) * math.prod(left[axis] for axis in integers(summed[1] if summed else ""))


GATHER = re.compile(r"gather_offload\S* = \(\((\w+\[[\d,]*\]).*?\), \w+\[([\d,]*)\].* custom-call-update\(")
GRANULE = 32
"""Bytes that a sparse core reads of the memory at once (a v5p or v6e, `dma_granule_size_bytes` of JAX's `TpuInfo`)."""


def overcounted(text: str) -> int:
    """Bytes that `cost_analysis` of a TPU's program has too much: of a gather that is left to the sparse cores it
    counts the whole array, twice. They read a granule for each number, from where the array lies."""
    found = [(size_of(whole), math.prod(integers(shape))) for whole, shape in GATHER.findall(text)]
    return sum(max(0, 2 * whole - GRANULE * numbers) for whole, numbers in found)
