"""Trains a language model whose head is spread over devices: shard_map, Optax, linear_cross_entropy(axis_name=...).

    python examples/vocab_parallel.py --steps 150 --out out/vocab_parallel.png
    python examples/vocab_parallel.py --processes 2

The batch is spread over the mesh axis `data`, the head's classes over `model`: on the accelerators that there are, or on 8
simulated CPU devices, which `--processes` divides among processes that find one another as those of a cluster do (where
each is started by hand, with `--process` and `--coordinator`). Then the same model is trained on one device: what each
device holds is compared, and the two loss curves must be the same.
"""

import argparse
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from char_lm import read_library
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int
from tqdm import tqdm

from softmax_jax import linear_cross_entropy

CONTEXT, EMBED = 8, 64
SIMULATED, SECONDS = 8, 600  # CPU devices in all; what --processes may take
BLUE, GREY = "#1f6fb4", "#aaaaaa"


class Model(NamedTuple):
    """Embeddings, one hidden layer that sees a token and those before it, and the head."""

    table: Float[Array, "vocabulary embed"]
    look: Float[Array, "context embed embed"]
    head: Float[Array, "embed classes"]


LAYOUT = Model(P(), P(), P(None, "model"))


def new_model(vocabulary: int) -> Model:
    shapes = Model((vocabulary, EMBED), (CONTEXT, EMBED, EMBED), (EMBED, vocabulary))
    draw = partial(np.random.default_rng(0).normal, scale=0.02)
    return Model(*(draw(size=shape).astype(np.float32) for shape in shapes))


def loss_of(model: Model, tokens: Int[Array, "batch length_and_1"], **how) -> Float[Array, ""]:
    x, layout = jax.nn.standardize(model.table[tokens[:, :-1]]), ("NWC", "WIO", "NWC")
    seen = lax.conv_general_dilated(x, model.look, (1,), [(CONTEXT - 1, 0)], dimension_numbers=layout)
    x = jax.nn.standardize(x + jax.nn.gelu(seen))
    return linear_cross_entropy(x, model.head, tokens[:, 1:], **how)


def loss_of_devices(vocabulary: int, model: Model, tokens: Int[Array, "batch length_and_1"]) -> Float[Array, ""]:
    """What each device does: `model.head` and `tokens` are its own part of the classes and of the batch."""
    classes, count = model.head.shape[1], lax.psum(tokens[:, 1:].size, "data")
    where = lax.axis_index("model") * classes + jnp.arange(classes) < vocabulary  # the last ones are padding
    return lax.psum(loss_of(model, tokens, axis_name="model", where=where, normalizer=count), "data")


class Trained(NamedTuple):
    losses: np.ndarray  # nats per token, one a step
    memory: dict[str, float]  # MiB of each device


def train(name: str, loss: Callable, model: Model, batches: list[Array]) -> Trained:
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 1e-2, len(batches) // 10, len(batches)))

    def step(model: Model, state: optax.OptState, tokens: Array):
        value, gradient = jax.value_and_grad(loss)(model, tokens)
        updates, state = optimizer.update(gradient, state, model)
        return optax.apply_updates(model, updates), state, value

    state, losses = optimizer.init(model), []  # the moments lie where the weights do
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(model, state, batches[0]).compile()
    held = model.head.addressable_shards[0].data.nbytes, compiled.memory_analysis().temp_size_in_bytes
    for tokens in (progress := tqdm(batches, name, unit="step", disable=jax.process_index() > 0)):
        model, state, value = compiled(model, state, tokens)
        losses.append(float(value))
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    memory = {name: size / 2**20 for name, size in zip(("head", "temporary"), held, strict=True)}
    return Trained(np.array(losses), memory)


def draw(runs: dict[str, Trained], difference: np.ndarray, vocabulary: int, path: Path) -> None:
    layout = [["loss", "memory"], ["difference", "memory"]]
    figure, axes = plt.subplot_mosaic(layout, figsize=(11, 6), width_ratios=[2, 1], height_ratios=[2, 1], layout="constrained")
    axes["loss"].axhline(math.log(vocabulary), color="#666666", ls=":", label=f"a guess among {vocabulary} tokens")
    for (name, run), style in zip(runs.items(), ({"color": BLUE, "lw": 1.2}, {"color": GREY, "lw": 5}), strict=True):
        axes["loss"].plot(run.losses, label=name, zorder=10 - style["lw"], **style)
    axes["loss"].set(title="Cross-entropy of the next token", ylabel="loss (nats per token)")
    axes["loss"].legend(frameon=False)
    axes["difference"].plot(1e6 * difference, color=BLUE, lw=1.2)
    axes["difference"].set(title="Relative difference of the two", xlabel="step", ylabel="millionths")
    for place, (run, colour) in enumerate(zip(runs.values(), (BLUE, GREY), strict=True)):
        x = np.arange(len(run.memory)) + 0.4 * place
        bars = axes["memory"].bar(x, list(run.memory.values()), 0.38, color=colour)
        axes["memory"].bar_label(bars, fmt="%.1f", padding=3)
    axes["memory"].set_xticks([0.2, 1.2], ["the head", "temporary memory\nof one step"])
    axes["memory"].set(title="MiB of each device", yticks=[], frame_on=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def run_processes(count: int) -> None:
    """This very command in each of them, on this machine; the first that fails ends all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, *(f"-W{option}" for option in sys.warnoptions), *sys.argv, "--coordinator", address]
    environment, deadline = os.environ | {"JAX_PLATFORMS": "cpu"}, time.monotonic() + SECONDS
    children = [subprocess.Popen([*command, "--process", str(index)], env=environment) for index in range(count)]
    try:
        while None in (codes := [child.poll() for child in children]) and not any(codes):
            if time.monotonic() > deadline:
                sys.exit(f"the processes are not done after {SECONDS} s")
            time.sleep(0.1)
    finally:
        for child in children:
            child.kill()
            child.wait()
    if any(codes):
        sys.exit(f"the processes ended with {codes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"steps": 150, "batch": 16, "length": 64, "vocabulary": 8191, "files": 300, "processes": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", type=int, help="devices that share the classes: by default 4, 2 or 1, as they divide")
    parser.add_argument("--process", type=int, default=0, help="which of the --processes this one is")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0")
    parser.add_argument("--out", type=Path, default=Path("out/vocab_parallel.png"))
    options = parser.parse_args()
    if options.processes > 1 and not options.coordinator:
        return run_processes(options.processes)
    jax.config.update("jax_num_cpu_devices", SIMULATED // options.processes)
    jax.config.update("jax_default_matmul_precision", "float32")  # accelerators would round each sum's operands
    if options.coordinator:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)

    devices = jax.device_count()
    parts = options.model or next(parts for parts in (4, 2, 1) if devices % parts == 0)
    mesh = jax.make_mesh((devices // parts, parts), ("data", "model"))
    tokenizer, (text, _) = read_library(options.files, options.vocabulary)
    vocabulary, window = tokenizer.get_vocab_size(), np.arange(options.length + 1)
    starts = np.random.default_rng(0).integers(len(text) - options.length, size=(options.steps, options.batch, 1))
    model, batches = new_model(vocabulary), list(text[starts + window].astype(np.int32))

    def spread(a: np.ndarray, spec: P) -> Array:
        """Each process makes the parts of its own devices."""
        return jax.make_array_from_callback(a.shape, NamedSharding(mesh, spec), a.__getitem__)

    padded = model._replace(head=np.pad(model.head, [(0, 0), (0, -vocabulary % parts)]))
    loss = jax.shard_map(
        partial(loss_of_devices, vocabulary), mesh=mesh, in_specs=(LAYOUT, P("data")), out_specs=P()
    )
    many = f"{devices // parts} x {parts} devices"
    runs = {many: train(many, loss, jax.tree.map(spread, padded, LAYOUT), [spread(rows, P("data")) for rows in batches])}
    if jax.process_index() > 0:
        return
    model, batches = jax.device_put((model, batches), jax.local_devices()[0])
    runs["one device"] = train("one device", loss_of, model, batches)
    difference = np.abs(runs[many].losses / runs["one device"].losses - 1)
    draw(runs, difference, vocabulary, options.out)
    print(f"{vocabulary} classes, padded to {padded.head.shape[1]}; {devices} devices of {jax.process_count()} processes")
    for name, run in runs.items():
        print(f"each of {name}:", *[f"{part} {size:.2f} MiB" for part, size in run.memory.items()], sep="  ")
    for name, run in runs.items():
        print(f"training loss, {name}: {run.losses[0]:.4f} -> {np.mean(run.losses[-10:]):.4f} nats")
    # The same numbers are added, in another order.
    print(f"largest relative difference of the curves: {difference.max():.1e}")
    print(f"picture: {options.out}")
    if not difference.max() < 1e-3:
        sys.exit("the curves part")


if __name__ == "__main__":
    main()
