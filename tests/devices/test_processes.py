"""Several processes: two of two CPU devices each on the loopback interface, the same numbers as in one process.

This file is also what each of them runs.
"""

import os
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

from softmax_jax import cross_entropy, linear_cross_entropy

SECONDS = 900


def losses_and_gradients(mesh):
    """By name: the plain door under `jit`, the head's by `axis_name` inside `shard_map`, as NumPy arrays."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 6, 16)).astype(np.float32)
    weight = rng.normal(size=(16, 32)).astype(np.float32)
    labels = rng.integers(0, 32, (8, 6)).astype(np.int32)
    specs = {"x": P("data"), "weight": P(None, "model"), "labels": P("data"), "logits": P("data", None, "model")}
    arrays = {"x": x, "weight": weight, "labels": labels, "logits": x @ weight}
    arrays = {
        name: jax.make_array_from_callback(a.shape, NamedSharding(mesh, specs[name]), lambda index, a=a: a[index])
        for name, a in arrays.items()
    }

    def head(x, weight, labels):
        loss = lambda *operands: jax.lax.psum(  # noqa: E731
            linear_cross_entropy(*operands, axis_name="model", normalizer=48, chunk_size=8, label_smoothing=0.1), "data"
        )
        in_specs = (specs["x"], specs["weight"], specs["labels"])
        return jax.shard_map(loss, mesh=mesh, in_specs=in_specs, out_specs=P())(x, weight, labels)

    with jax.set_mesh(mesh):
        logits = jax.jit(jax.value_and_grad(cross_entropy))(arrays["logits"], arrays["labels"])
        both = jax.jit(jax.value_and_grad(head, (0, 1)))(arrays["x"], arrays["weight"], arrays["labels"])
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))
    names = ["loss", "dlogits", "head's loss", "dx", "dweight"]
    return dict(zip(names, map(np.asarray, jax.tree.leaves(whole((logits, both)))), strict=True))


def one_of_two(port: str, index: str, path: str) -> None:
    sys.excepthook = _fail_at_once
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index))
    assert jax.device_count() == 4 and jax.local_device_count() == 2 and jax.process_count() == 2
    numbers = losses_and_gradients(mesh_of("automatic", (2, 2)))
    np.savez(path, **numbers)
    jax.distributed.shutdown()


def _fail_at_once(*error):
    """JAX's own exit waits minutes for the other process, which waits for this one."""
    traceback.print_exception(*error)
    os._exit(1)


def run_two(tmp_path, command=()):
    """Both processes to their end, or to the time limit; an error of one of them is this one's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    flags = "--xla_force_host_platform_device_count=2"
    path = os.pathsep.join(str(Path(__file__).parents[up]) for up in (1, 2))  # meshes.py, the library
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # as this process, see conftest.py
    paths, logs = ([tmp_path / f"{index}.{kind}" for index in range(2)] for kind in ("npz", "log"))
    children = []
    for index in range(2):
        arguments = [sys.executable, *(command or (__file__,)), port, str(index), str(paths[index])]
        with open(logs[index], "w") as log:
            children.append(subprocess.Popen(arguments, env=env, stdout=log, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + SECONDS
    while None in (codes := [child.poll() for child in children]) and not any(codes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for child in children:
        child.kill()
        child.wait()
    for index, code in enumerate(codes):
        if code:
            pytest.fail(f"process {index} ended with {code}:\n{logs[index].read_text()}")
    if None in codes:
        pytest.fail(f"no end within {SECONDS} s:\n" + "\n".join(log.read_text() for log in logs))
    return [dict(np.load(path)) for path in paths]


def test_two_processes_give_what_one_gives(tmp_path):
    want = losses_and_gradients(mesh_of("automatic", (2, 2)))
    for got in run_two(tmp_path):
        assert got.keys() == want.keys()
        for name in want:
            budget = 16 * np.finfo(np.float32).eps * np.max(np.abs(want[name]))
            np.testing.assert_allclose(got[name], want[name], rtol=0, atol=budget, err_msg=name)


def test_the_error_of_a_process_is_the_tests_own(tmp_path):
    with pytest.raises(pytest.fail.Exception, match="(?s)ended with 1:.*AssertionError: the head is gone"):
        run_two(tmp_path, ("-c", "raise AssertionError('the head is gone')"))


if __name__ == "__main__":
    one_of_two(*sys.argv[1:])
