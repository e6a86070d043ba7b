"""What a GPU or a TPU would do, told by its compiler on a machine that has neither: `python -m benchmarks compiled`.

JAX compiles for a described device without having it. The compiled program says exactly which kernels run and which
arrays each of them reads and writes; only their time is unknown. Needs `pip install -e '.[accelerators]'`, the
compilers, which are of 5 GB. A module of its own, since without a driver JAX loads them in a process that was told
JAX_PLATFORMS=cpu before it was started.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

import softmax_jax as sj  # noqa: E402
from benchmarks.kernels import kernels, overcounted  # noqa: E402
from benchmarks.peers import optax_with_accuracy, with_accuracy  # noqa: E402


class Gpu(NamedTuple):
    """Facts of the maker."""

    name: str
    capability: tuple[int, int]
    cores: int
    memory: int  # bytes
    speed: float  # of the memory, bytes/s
    clock: float  # GHz
    l2: int  # bytes
    shared: int  # bytes of a core
    rate: float  # of large bfloat16 matrix products as published, operations/s


GPUS = {
    "A100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 85_100_000_000, 2.039e12, 1.41, 41_943_040, 167_936, 260e12),
    "H100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 84_942_979_072, 3.352e12, 1.98, 52_428_800, 233_472, 700e12),
    "H200": Gpu("NVIDIA H200 141GB HBM3e", (9, 0), 132, 151_397_597_184, 4.8e12, 1.98, 52_428_800, 233_472, 790e12),
    "B200": Gpu("NVIDIA B200", (10, 0), 148, 191_000_000_000, 7.7e12, 1.965, 132_644_864, 233_472, 1500e12),
}
TPUS = {"TPU v5e": "v5e:2x2", "TPU v5p": "v5p:2x2x1", "TPU v6e": "v6e:2x2"}


def described(gpu: Gpu) -> str:
    """A GPU as XLA's compiler wants to be told of it."""
    accelerated = "" if gpu.capability[0] < 9 else "feature_extension: ACCELERATED_FEATURES"
    return f"""gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
      shared_memory_per_core: {gpu.shared} threads_per_core_limit: 2048 core_count: {gpu.cores} fpus_per_core: 128
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {int(gpu.speed)} l2_cache_size: {gpu.l2} clock_rate_ghz: {gpu.clock}
      device_memory_size: {gpu.memory} shared_memory_per_block_optin: {gpu.shared - 1024}
      cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} {accelerated} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{gpu.name}" """


class Cost(NamedTuple):
    kernels: int | None  # None where the compiler does not tell
    moved: int  # bytes
    temporary: int  # bytes
    seconds: float | None  # a roofline: each kernel at 90 % of the memory's speed or at the rate of matrix products


def cost(device: str, f: Callable, operands: Sequence[jax.ShapeDtypeStruct]) -> Cost:
    """Of f, compiled for one device."""
    if device in GPUS:
        of_device: dict[str, Any] = {"target_config": described(GPUS[device]), "topology": "1x1x1"}
        topology = topologies.get_topology_desc("none", platform="cuda", **of_device)
    else:
        topology = topologies.get_topology_desc(TPUS[device], platform="tpu")
    sharding = SingleDeviceSharding(topology.devices[0])
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in operands]
    platform = "cuda" if device in GPUS else "tpu"
    program: Any = jax.jit(f).trace(*placed).lower(lowering_platforms=(platform,)).compile()
    temporary = program.memory_analysis().temp_size_in_bytes
    if device in TPUS:
        counted = program.cost_analysis()["bytes accessed"]
        return Cost(None, round(counted) - overcounted(program.as_text()), temporary, None)
    gpu, found = GPUS[device], list(kernels(program.as_text()))
    seconds = sum(k.times * max(k.moved / (0.9 * gpu.speed), k.operations / gpu.rate) for k in found)
    return Cost(sum(k.times for k in found), sum(k.times * k.moved for k in found), temporary, seconds)


# What is compiled: ours and the peer's, of logits, labels, a teacher's logits or a cotangent.


def told(s: sj.LabelStatistics) -> tuple:
    return s.log_prob, s.entropy, s.correct, s.rank


def told_by_jax(z, y):
    log_p = jax.nn.log_softmax(z.astype(jnp.float32), 1)
    of_label = jnp.take_along_axis(log_p, jnp.expand_dims(y, 1), 1)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, 1)
    return jnp.squeeze(of_label, 1), entropy, jnp.argmax(z, 1) == y, jnp.sum(log_p > of_label, 1)


def with_gradient(f: Callable) -> Callable:
    return jax.value_and_grad(lambda *operands: jnp.mean(f(*operands)))


def pulled(f: Callable) -> Callable:
    return lambda z, g: jax.vjp(f, z)[1](g)


ACCURACY = "integer labels, with gradient, accuracy, log-normalizer"

# The classes are on axis 1, which is also the last of the common shapes.


def optax_kl(a, b):
    a, b = (jax.nn.log_softmax(z.astype(jnp.float32), 1) for z in (a, b))
    return optax.losses.kl_divergence_with_log_targets(a, b, axis=1)


def kl(a, b):
    return sj.kl_divergence(a, teacher_logits=b, axis=1)


def all_options(z, y):
    return cross_entropy(z, y, label_smoothing=0.1, z_loss=1e-4, logit_scale=0.7, softcap=30.0)


cross_entropy, log_softmax, softmax = (partial(f, axis=1) for f in (sj.cross_entropy, sj.log_softmax, sj.softmax))
jax_log_softmax, jax_softmax = (partial(f, axis=1) for f in (jax.nn.log_softmax, jax.nn.softmax))
IDS = partial(optax.softmax_cross_entropy_with_integer_labels, axis=1)
DENSE = partial(optax.softmax_cross_entropy, axis=1)
CASES = {  # name: (what stands beside the logits, ours, the peer's)
    "integer labels, forward": ("ids", cross_entropy, lambda z, y: jnp.mean(IDS(z, y))),
    "integer labels, with gradient": ("ids", with_gradient(cross_entropy), with_gradient(IDS)),
    "dense labels, forward": ("rows", cross_entropy, lambda z, t: jnp.mean(DENSE(z, t))),
    "dense labels, with gradient": ("rows", with_gradient(cross_entropy), with_gradient(DENSE)),
    "all options, with gradient": ("ids", with_gradient(all_options), None),
    ACCURACY: (
        "ids",
        jax.value_and_grad(with_accuracy, has_aux=True),
        jax.value_and_grad(optax_with_accuracy, has_aux=True),
    ),
    "log_prob, entropy, correct, rank": ("ids", lambda z, y: told(sj.label_statistics(z, y, axis=1)), told_by_jax),
    "KL from logits, forward": ("rows", kl, optax_kl),
    "KL from logits, with gradient": ("rows", with_gradient(kl), with_gradient(optax_kl)),
    "log_softmax, forward": ("", log_softmax, jax_log_softmax),
    "log_softmax, gradient": ("rows", pulled(log_softmax), pulled(jax_log_softmax)),
    "softmax, forward": ("", softmax, jax_softmax),
    "softmax, gradient": ("rows", pulled(softmax), pulled(jax_softmax)),
}
SHAPE, DTYPE = (8192, 128256), "bfloat16"
SIZES = {
    "4096 x 32000 float32": ((4096, 32000), "float32"),
    "65536 x 1000 float32": ((65536, 1000), "float32"),
    "8 x 150 x 256 x 256 bfloat16, axis 1": ((8, 150, 256, 256), "bfloat16"),
    "262144 x 16 float32": ((262144, 16), "float32"),
}


def both(device: str, name: str, shape: tuple[int, ...], dtype: str) -> tuple[Cost, Cost | None]:
    """(ours, the peer's) of one case."""
    logits, ids = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:1] + shape[2:], jnp.int32)
    kind, ours, peer = CASES[name]
    beside = {"ids": (ids,), "rows": (logits,), "": ()}[kind]
    operands = (logits, *beside)
    return cost(device, ours, operands), None if peer is None else cost(device, peer, operands)


def measured(devices: Sequence[str], shape: tuple[int, ...] = SHAPE, dtype: str = DTYPE) -> dict[str, dict]:
    """{device: {case: (ours, the peer's)}}, each cost as (kernels, bytes moved, temporary bytes), the bytes in units of
    the logits."""
    unit = math.prod(shape) * jnp.dtype(dtype).itemsize
    cases = [name for name in CASES if len(shape) == 2 or name != ACCURACY]  # which has the classes last
    return {d: {name: [ratios(c, unit) for c in both(d, name, shape, dtype)] for name in cases} for d in devices}


def ratios(of: Cost | None, unit: int) -> tuple | None:
    return None if of is None else (of.kernels, of.moved / unit, of.temporary / unit)


def measured_sizes(devices: Sequence[str]) -> dict[str, dict]:
    """{device: {size: {case: (ours, the peer's)}}}"""
    return {d: {size: measured([d], *of_size)[d] for size, of_size in SIZES.items()} for d in devices}


# softmax as it is used: what is made of it decides its gradient.

ATTENTION = (128, 1024, 64)  # heads of all examples, tokens, embed


def attention(f: Callable) -> Callable:
    def loss(q, k, v):
        scores = jnp.einsum("bqd,bkd->bqk", q, k)
        return jnp.sum(jnp.tanh(jnp.einsum("bqk,bkd->bqd", f(scores), v)).astype(jnp.float32))

    return jax.value_and_grad(loss, (0, 1, 2))


def measured_attention(devices: Sequence[str]) -> dict[str, dict]:
    """{device: {dtype: (ours, that of jax.nn)}}, in units of the scores."""
    batch, tokens, _ = ATTENTION

    def of(device, dtype):
        unit, operands = batch * tokens**2 * jnp.dtype(dtype).itemsize, [jax.ShapeDtypeStruct(ATTENTION, dtype)] * 3
        return [ratios(cost(device, attention(f), operands), unit) for f in (sj.softmax, jax.nn.softmax)]

    return {d: {dtype: of(d, dtype) for dtype in ("bfloat16", "float32")} for d in devices}


# The loss of hidden states and a head, with both gradients, beside that of the logits that their product is.

HEADS = [
    (n, embed, classes) for classes in (32000, 128256) for embed in (1024, 4096) for n in (1024, 4096, 8192, 65536)
]


def of_product(dtype: str) -> Callable:
    """Optax's, of logits in that dtype."""

    def loss(x, weight, labels):
        return jnp.mean(IDS(jnp.matmul(x, weight, preferred_element_type=dtype), labels))

    return loss


def if_it_fits(device: str, f: Callable, operands: Sequence[jax.ShapeDtypeStruct]) -> Cost | None:
    try:
        return cost(device, f, operands)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def of_head(device: str, tokens: int, embed: int, classes: int) -> list[Cost | None]:
    """Ours, Optax's of bfloat16 logits, and of float32 logits. None where they do not fit."""
    shapes = ((tokens, embed), DTYPE), ((embed, classes), DTYPE), ((tokens,), "int32")
    operands = [jax.ShapeDtypeStruct(*of) for of in shapes]
    peers = of_product(DTYPE), of_product("float32")
    return [if_it_fits(device, jax.value_and_grad(f, (0, 1)), operands) for f in (sj.linear_cross_entropy, *peers)]


def measured_heads(devices: Sequence[str], heads: Sequence[tuple[int, int, int]] = HEADS) -> dict[str, dict]:
    """{device: {"tokens x embed x classes": [(temporary MiB, roofline ms or None), ...]}}"""
    told = lambda c: c and (c.temporary / 2**20, c.seconds and 1e3 * c.seconds)  # noqa: E731
    name = "{} x {} x {}".format
    return {d: {name(*head): [told(c) for c in of_head(d, *head)] for head in heads} for d in devices}


if __name__ == "__main__":
    part, *asked = sys.argv[1:]
    heads: list[Any] = [tuple(map(int, name.split("x"))) for name in asked if "x" in name]
    devices = [name for name in asked if "x" not in name]
    parts = {
        "logits": measured,
        "sizes": measured_sizes,
        "attention": measured_attention,
        "heads": partial(measured_heads, heads=heads or HEADS),
    }
    found = parts[part](devices)
    json.dump(found, sys.stdout)
