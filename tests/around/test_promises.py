"""What is promised beside the numbers: bytes kept, bytes used, no recompilation, no NaN on the way, repeatability."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ALONE, FLOATS, compilations, few_of, random_case

from softmax_jax import (
    SparseLabels,
    cross_entropy,
    kl_divergence,
    label_statistics,
    linear_cross_entropy,
    linear_kl_divergence,
    linear_label_statistics,
    log_softmax,
    softmax,
)


def kept(pull):
    """Bytes of the residuals of a pullback."""
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(pull))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("shape", "axis"), [((32, 512), -1), ((512, 32), 0)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_kept_are_the_raw_logits_and_a_few_numbers_a_token(variant, rng, dtype, shape, axis, reduction):
    """No probabilities, no one-hot, no float32 copy, no transpose; the label and at most 6 float32 a token."""
    logits, labels, _ = random_case(rng, shape, axis, dtype)
    _, pull = jax.vjp(variant(lambda x: cross_entropy(x, labels, axis=axis, reduction=reduction)), jnp.asarray(logits))
    assert logits.nbytes <= kept(pull) <= logits.nbytes + 32 * 4 * 7 + 64
    assert sum(np.asarray(leaf).shape == shape for leaf in jax.tree.leaves(pull)) == 1


@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
def test_options_keep_no_array_of_logits_size_but_the_operands(variant, rng, dense):
    """Logits, the mask, dense labels: as they came. For all options together, 16 numbers a token (weights,
    counts, the partial derivatives that each step keeps), and the class weights twice."""
    names = [name for name in ALONE if not (dense and name == "ignore_index")]
    logits, labels, options = random_case(rng, (32, 512), -1, jnp.bfloat16, dense, names)
    _, pull = jax.vjp(variant(lambda x: cross_entropy(x, labels, **options)), jnp.asarray(logits))
    operands = logits.nbytes + options["where"].nbytes + 2 * options["class_weights"].nbytes + labels.nbytes
    assert kept(pull) <= operands + 32 * 4 * 16 + 64


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.cpu_compiler
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_compiled_gradient_needs_at_most_a_twentieth_of_the_logits(device, dtype, label_smoothing):
    if dtype == jnp.bfloat16 and device.platform == "cpu" and jax.__version_info__ < (0, 11):
        pytest.skip("XLA on the CPU makes float32 of a 16-bit array that a loop slices")
    logits = jax.ShapeDtypeStruct((4096, 32000), dtype)
    labels = jax.ShapeDtypeStruct((4096,), jnp.int32)
    f = jax.value_and_grad(lambda x, y: cross_entropy(x, y, label_smoothing=label_smoothing))
    memory = jax.jit(f).lower(logits, labels).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 0.05 * logits.size * logits.dtype.itemsize


def test_eager_calls_of_one_shape_compile_once(rng):
    logits, labels, options = random_case(rng, (5, 17), names=FLOATS)
    arrays = jnp.asarray(logits), jnp.asarray(labels)
    options = {k: float(options[k]) for k in FLOATS}
    cross_entropy(*arrays, **options)
    with compilations() as names:
        for factor in (0.3, 0.7, 0.9):
            cross_entropy(*arrays, **{k: v * factor for k, v in options.items()})
    assert names == []


@pytest.mark.compiled
def test_a_schedule_compiles_once(rng):
    """Every float option is a traced scalar of a training step."""
    logits, labels, options = random_case(rng, (5, 17), names=[*FLOATS, "weights", "class_weights"])
    axis = options.pop("axis")
    loss = chex.assert_max_traces(lambda x, o: cross_entropy(x, labels, axis=axis, normalizer=o["z_loss"], **o), n=1)
    step = jax.jit(jax.value_and_grad(loss))
    results = {float(step(logits, options)[0])}
    with compilations() as names:
        for factor in (0.3, 0.7, 0.9):
            results.add(float(step(logits, {k: v * np.float32(factor) for k, v in options.items()})[0]))
    assert names == [] and len(results) == 4


@pytest.mark.parametrize("x64", [False, True])
def test_python_numbers_do_not_change_the_dtype(rng, x64):
    with jax.enable_x64(x64):
        for dtype in (jnp.float32, jnp.bfloat16):
            logits, labels, options = random_case(rng, (5, 7), dtype=dtype, names=ALONE)
            options = {k: float(v) if k in FLOATS else v for k, v in options.items()}
            both = jax.value_and_grad(lambda x, y=labels, o=options: cross_entropy(x, y, normalizer=3.0, **o))
            loss, grad = jax.eval_shape(both, jnp.asarray(logits))
            assert loss.dtype == jnp.float32 and grad.dtype == dtype and not loss.weak_type and not grad.weak_type


@pytest.mark.diagonal
@pytest.mark.parametrize("dense", few_of([False, True]), ids=["integer", "dense"])
@pytest.mark.parametrize("names", few_of([ALONE, [], ["label_smoothing"]]), ids=len)
@pytest.mark.parametrize("door", few_of(["logits", "linear"]))
@pytest.mark.parametrize("no_jit", few_of([False, True]), ids=["jit", "operations"])
def test_debug_nans_stays_silent_on_valid_input(rng, door, names, dense, no_jit):
    """With logits of -inf, hidden classes, rows of weight 0, rows without any class and an id of -100 that is ignored.
    Nor does one operation, run by itself, make a NaN that a `where` then hides."""
    logits, labels, options = random_case(rng, (6, 7), dense=dense, names=names)
    if door == "logits" and ("softcap" in names or "label_smoothing" not in names):  # else a loss of inf
        logits[:, 2] = -np.inf
        labels = np.where(np.arange(7) == 2, 0, labels) if dense else np.where(labels == 2, 3, labels).astype(np.int32)
    if "where" in names:
        options["where"][np.arange(6), 3] |= True
        options["where"][4] = False
        options["weights"][5], logits[5] = 0, logits[5] if door == "linear" else -np.inf
        if dense:
            del options["ignore_index"]
        else:
            options["ignore_index"], labels[0] = -100, -100
    if door == "linear":
        identity = np.eye(7, dtype=np.float32)
        del options["axis"]
        loss = lambda x: linear_cross_entropy(x, identity, labels, chunk_size=4, **options)  # noqa: E731
    else:
        loss = lambda x: cross_entropy(x, labels, **options)  # noqa: E731
    gradient = jax.value_and_grad(lambda x: -1.3 * loss(x))
    with jax.debug_nans(True):
        value, grad = jax.jit(gradient)(jnp.asarray(logits))
        with jax.disable_jit(no_jit):
            again, _ = gradient(jnp.asarray(logits)) if no_jit else (value, grad)
    assert np.isfinite(value) and np.all(np.isfinite(grad))
    np.testing.assert_allclose(again, value, rtol=1e-6)


def other_doors(rng):
    """(name, the sum of a door's numbers, operands): a class at -inf, hidden classes, an id that is ignored, and for
    the losses a row of weight 0 that is -inf alone, with an entry of no class."""
    logits, teacher = (np.float32(3 * rng.normal(size=(6, 7))) for _ in range(2))
    states, head = (np.float32(rng.normal(size=shape)) for shape in ((6, 4), (4, 7)))
    logits[:, 1] = teacher[:, 1] = -np.inf
    where = (rng.random((6, 7)) < 0.7) | (np.arange(7) % 3 == 0)
    for name, door in ("softmax", softmax), ("log_softmax", log_softmax):
        yield name, lambda x, door=door: jnp.sum(door(x, where=where)[:, 3]), (logits,)

    labels = np.int32([3, -100, 3, 3, 3, 3])
    told = lambda found: jnp.sum(found.log_prob + found.log_normalizer + found.entropy)  # noqa: E731
    chosen = {"where": where, "logit_scale": 0.7, "softcap": 5.0, "ignore_index": -100}
    yield "label_statistics", lambda x: told(label_statistics(x, labels, **chosen)), (logits,)
    of_states = lambda x, w: told(linear_label_statistics(x, w, labels, chunk_size=4, **chosen))  # noqa: E731
    yield "linear_label_statistics", of_states, (states, head)

    logits, teacher, weights = logits.copy(), teacher.copy(), np.float32([1, 2, 0, 1, 3, 0.5])
    logits[2] = teacher[2] = -np.inf
    finite, few = np.maximum(logits, -9), np.int32([[3, 0]] * 2 + [[3, 7]] + [[3, 0]] * 3)
    few = SparseLabels(few, np.float32([[0.6, 0.3]] * 6), np.float32([0.1] * 6))
    weighted = {"where": where, "weights": weights}
    yield "SparseLabels", lambda x: cross_entropy(x, few, **weighted), (finite,)

    for beta in 0.0, 0.25, 1.0:
        of_logits = lambda a, b, beta=beta: kl_divergence(  # noqa: E731
            a, teacher_logits=b, temperature=2.0, beta=beta, **weighted
        )
        yield f"kl_divergence {beta}", of_logits, (logits, teacher)
    probs = np.exp(finite, where=np.arange(7) != 5, out=np.zeros_like(finite))
    yield (
        "kl_divergence of probabilities",
        lambda a, t: kl_divergence(a, teacher_probs=t, temperature=2.0),
        (finite, probs),
    )
    yield "kl_divergence of SparseLabels", lambda a: kl_divergence(a, teacher_probs=few, **weighted), (finite,)
    heads = {"chunk_size": 4, "weights": weights, "beta": 0.25}
    between = lambda x, w: linear_kl_divergence(x, w, teacher_x=2 * x, teacher_weight=w, **heads)  # noqa: E731
    yield "linear_kl_divergence", between, (states, head)


FIRST = [
    "label_statistics",
    "log_softmax",
    "SparseLabels",
    "kl_divergence 0.25",
    "linear_kl_divergence",
]
OTHERS = FIRST + [name for name, *_ in other_doors(np.random.default_rng(0)) if name not in FIRST]


CASES = [(name, no_jit) for no_jit in (False, True) for name in OTHERS]


@pytest.mark.parametrize("case", few_of(CASES, thorough=len(OTHERS) - 1), ids=str)
def test_debug_nans_stays_silent_at_every_other_door(rng, case):
    """As above, value and gradients; what takes longer, operation by operation, for each."""
    name, no_jit = case
    ((_, f, operands),) = (case for case in other_doors(rng) if case[0] == name)
    both = jax.value_and_grad(lambda *operands: -1.3 * f(*operands), tuple(range(len(operands))))
    with jax.debug_nans(True), jax.disable_jit(no_jit):
        found = both(*map(jnp.asarray, operands))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))


def test_bitwise_the_same_in_every_run(rng):
    logits, labels, options = random_case(rng, (64, 507), dtype=jnp.bfloat16, names=ALONE)
    f = jax.jit(jax.value_and_grad(lambda x: 0.3 * cross_entropy(x, labels, **options)))
    first = f(logits)
    for _ in range(5):
        for a, b in zip(f(logits), first, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("names", [[], ["label_smoothing", "z_loss", "class_weights"]], ids=len)
def test_bitwise_the_same_whatever_the_other_rows_hold(rng, names):
    """A row's loss and gradient depend neither on its place in the batch nor on NaN, inf or bad labels beside it."""
    logits, labels, options = random_case(rng, (8, 123), names=names)
    cotangent = rng.normal(size=8).astype(np.float32)

    @jax.jit
    def f(logits, labels, cotangent):
        loss, pull = jax.vjp(lambda x: cross_entropy(x, labels, reduction="none", **options), logits)
        return loss, pull(cotangent)[0]

    want = f(logits, labels, cotangent)
    order = rng.permutation(8)
    bad, bad_labels = logits.copy(), labels.copy()
    bad[0], bad[1], bad[2], bad_labels[3] = np.nan, np.inf, -np.inf, -1
    for got, rows, places in (
        (f(logits[order], labels[order], cotangent[order]), order, slice(None)),
        (f(bad, bad_labels, cotangent), slice(4, None), slice(4, None)),
    ):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a[places], b[rows])


@pytest.mark.compiled
@pytest.mark.cpu_compiler
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the older compiler makes it twice all the same")
@pytest.mark.parametrize("teacher", [False, True], ids=["labels", "teacher"])
def test_a_gradient_of_two_batch_axes_is_made_once(teacher):
    """Beside the logits that a product makes there is their gradient, transposed for that of the head, as of Optax."""
    x, head = jax.ShapeDtypeStruct((8, 512, 32), jnp.float32), jax.ShapeDtypeStruct((32, 16384), jnp.float32)
    labels = jax.ShapeDtypeStruct((8, 512, 16384) if teacher else (8, 512), jnp.float32 if teacher else jnp.int32)
    loss = (lambda z, t: kl_divergence(z, teacher_logits=t)) if teacher else cross_entropy
    program = jax.jit(jax.grad(lambda x, head, labels: loss(x @ head, labels), (0, 1))).lower(x, head, labels)
    logits = 4 * 8 * 512 * 16384
    assert program.compile().memory_analysis().temp_size_in_bytes < 2.2 * logits


@pytest.mark.compiled
@pytest.mark.cpu_compiler
def test_two_losses_in_one_program_share_nothing_of_logits_size():
    """XLA on the CPU writes out at the logits' size what two row sums share, be it a constant."""
    logits, labels = jax.ShapeDtypeStruct((4096, 32000), jnp.float32), jax.ShapeDtypeStruct((4096,), jnp.int32)

    def temporary(f, *operands):
        program = jax.jit(jax.grad(lambda a, b, *o: jnp.sum(f(a, *o) + f(b, *o)), (0, 1)))
        return program.lower(logits, logits, *operands).compile().memory_analysis().temp_size_in_bytes

    teacher = lambda a, t: kl_divergence(a, teacher_logits=t)  # noqa: E731
    for f, operands in [(cross_entropy, [labels]), (cross_entropy, [logits]), (teacher, [logits])]:
        assert temporary(f, *operands) < 0.1 * 4 * 4096 * 32000, f
    both = jax.jit(lambda a, b: (log_softmax(a), log_softmax(b))).lower(logits, logits).compile()
    assert both.memory_analysis().temp_size_in_bytes < 0.1 * 4 * 4096 * 32000
