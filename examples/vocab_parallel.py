"""Trains a language model with its head spread over devices: shard_map, Optax, linear_cross_entropy(axis_name=...).

    python examples/vocab_parallel.py --steps 120 --out out/vocab_parallel.png
    python examples/vocab_parallel.py --processes 2

The batch lies over the mesh axis `data`, the head's classes over `model`: on the accelerators that there are, else on 8
CPU devices that JAX simulates. `--processes` divides those among processes that find one another as in a cluster. Then
the same model is trained on one device: the losses must agree, and what a device holds either way is printed.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array, NamedSharding, P, lax
from jaxtyping import Float, Int
from language_model import SHIPPED, read_text

from softmax_jax import linear_cross_entropy

CONTEXT, EMBED, SIMULATED = 8, 64, 8
LAYOUT = {"table": P(), "look": P(), "head": P(None, "model")}
Model = dict[str, Array]


def loss_of(model: Model, tokens: Int[Array, "batch length_and_1"], **how) -> Float[Array, ""]:
    """An embedding of each token, one hidden layer that sees it and those before it, and the head."""
    x, axes = jax.nn.standardize(model["table"][tokens[:, :-1]]), ("NWC", "WIO", "NWC")
    seen = lax.conv_general_dilated(x, model["look"], (1,), [(CONTEXT - 1, 0)], dimension_numbers=axes)
    return linear_cross_entropy(jax.nn.standardize(x + jax.nn.gelu(seen)), model["head"], tokens[:, 1:], **how)


def loss_of_device(vocabulary: int, model: Model, tokens: Int[Array, "batch length_and_1"]) -> Float[Array, ""]:
    """The same loss, where this device has but its part of the batch and, in the head, its part of the classes."""
    count, classes = lax.psum(tokens[:, 1:].size, "data"), model["head"].shape[1]
    where = lax.axis_index("model") * classes + jnp.arange(classes) < vocabulary  # the last classes are padding
    return lax.psum(loss_of(model, tokens, axis_name="model", where=where, normalizer=count), "data")


def train(name: str, loss_of: Callable, model: Model, batches: list[Array]) -> tuple[np.ndarray, list[float]]:
    """The loss of each step; MiB of the head and of a step's temporary memory on each device."""
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 1e-2, len(batches) // 10, len(batches)))

    def step(model: Model, state: optax.OptState, tokens: Array):
        loss, gradient = jax.value_and_grad(loss_of)(model, tokens)
        updates, state = optimizer.update(gradient, state, model)
        return optax.apply_updates(model, updates), state, loss

    state, losses = optimizer.init(model), []  # the moments lie as the model does
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(model, state, batches[0]).compile()
    sizes = model["head"].addressable_data(0).nbytes, compiled.memory_analysis().temp_size_in_bytes  # pyright: ignore
    for at, tokens in enumerate(batches, 1):
        model, state, loss = compiled(model, state, tokens)
        losses.append(float(loss))
        if at % 20 == 0 and jax.process_index() == 0:
            print(f"{name}: step {at} of {len(batches)}, training loss {losses[-1]:.3f}", flush=True)
    return np.array(losses), [size / 2**20 for size in sizes]


def draw(runs: dict, vocabulary: int, path: Path) -> None:
    figure, (above, below) = plt.subplots(2, 1, figsize=(8.5, 6.4), height_ratios=[2, 1], layout="constrained")
    above.axhline(np.log(vocabulary), color="#666666", ls=":", label=f"a guess among {vocabulary} tokens")
    for (name, (losses, sizes)), (color, width) in zip(runs.items(), [("#bbbbbb", 6), ("#1f6fb4", 1.5)], strict=True):
        above.plot(losses, color=color, lw=width, label=f"{name}: {sizes[1]:.1f} MiB a device for a step")
    above.set(title="Cross-entropy of the next token", xlabel="step", ylabel="loss (nats per token)")
    above.legend(frameon=False)
    nats = np.abs(np.subtract(*(losses for losses, _ in runs.values())))
    below.plot(1e6 * nats, ".-", color="#1f6fb4", lw=0.8, ms=4)
    below.set(title="Difference of the two losses (float32 numbers from 4 to 8 are half a millionth apart)")
    below.set(xlabel="step", ylabel="millionths of a nat", xlim=above.get_xlim(), ylim=(0, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def run_processes(count: int, seconds: int) -> None:
    """This very command in each of several processes, until all are done, or one fails, or the time is over."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, *(f"-W{option}" for option in sys.warnoptions), *sys.argv, "--coordinator", address]
    environment, end = os.environ | {"JAX_PLATFORMS": "cpu"}, time.monotonic() + seconds
    children = [subprocess.Popen([*command, "--process", str(index)], env=environment) for index in range(count)]
    while None in (codes := [child.poll() for child in children]) and not any(codes) and time.monotonic() < end:
        time.sleep(0.1)
    for child in children:
        child.kill()
        child.wait()
    sys.exit(f"exit codes of the processes: {codes} (None: was stopped)" if codes != [0] * count else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"steps": 120, "batch": 16, "length": 64, "vocabulary": 8185}
    for name, default in (numbers | {"processes": 1, "process": 0, "seconds": 600}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", type=int, help="devices that share the classes; by default 4, 2 or 1, which divides")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, where each --process is started by itself")
    parser.add_argument("--out", type=Path, default=Path("out/vocab_parallel.png"))
    options = parser.parse_args()
    if options.processes > 1 and not options.coordinator:
        return run_processes(options.processes, options.seconds)
    jax.config.update("jax_num_cpu_devices", SIMULATED // options.processes)
    jax.config.update("jax_default_matmul_precision", "float32")  # a GPU would round to 10 bits
    if options.coordinator:
        # JAX would have a process that fails wait for the others, which wait for it.
        sys.excepthook = lambda *error: (sys.__excepthook__(*error), os._exit(1))
        jax.distributed.initialize(options.coordinator, options.processes, options.process)

    devices = jax.device_count()
    parts = options.model or next(parts for parts in (4, 2, 1) if devices % parts == 0)
    mesh = jax.make_mesh((devices // parts, parts), ("data", "model"))

    def put(a, spec):
        return jax.make_array_from_callback(a.shape, NamedSharding(mesh, spec), a.__getitem__)

    tokenizer, (training, _) = read_text(SHIPPED, options.vocabulary)
    vocabulary, rng = tokenizer.get_vocab_size(), np.random.default_rng(0)
    starts = rng.integers(len(training) - options.length, size=(options.steps, options.batch, 1))
    batches = list(training[starts + np.arange(options.length + 1)].astype(np.int32))
    shapes = {"table": (vocabulary, EMBED), "look": (CONTEXT, EMBED, EMBED), "head": (EMBED, vocabulary)}
    model = {name: rng.normal(scale=0.02, size=shape).astype(np.float32) for name, shape in shapes.items()}
    padded = model | {"head": np.pad(model["head"], [(0, 0), (0, -vocabulary % parts)])}

    f = partial(loss_of_device, vocabulary)
    over_mesh = jax.shard_map(f, mesh=mesh, in_specs=(LAYOUT, P("data")), out_specs=P())
    name = f"{devices} devices, batch in {devices // parts}, classes in {parts} parts"
    spread = train(name, over_mesh, jax.tree.map(put, padded, LAYOUT), [put(rows, P("data")) for rows in batches])
    if jax.process_index() > 0:
        return
    here = jax.device_put((model, batches), jax.local_devices()[0])
    runs = {"one device": train("one device", loss_of, *here), name: spread}
    difference = np.abs(spread[0] / runs["one device"][0] - 1)
    draw(runs, vocabulary, options.out)
    print(f"processes: {jax.process_count()}; {vocabulary} classes, padded to {padded['head'].shape[1]}")
    for name, (losses, (head, temporary)) in runs.items():
        print(f"{name}: training loss: {losses[0]:.4f} -> {losses[-10:].mean():.4f} nats; each device:", end=" ")
        print(f"head {head:.2f} MiB, temporary memory of one step {temporary:.2f} MiB")
    print(f"the losses differ by {difference.max():.1e} of themselves at most: the same sums, in another order")
    print(f"picture: {options.out}")
    sys.exit(0 if difference.max() < 1e-4 else "that is more than rounding")


if __name__ == "__main__":
    main()
