"""What the functions refuse, while tracing: every message names the values and ends with the way out."""

import math
import operator
from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from softmax_jax._dtypes import AnyArray, accumulator, nan_unless
from softmax_jax._labels import Dense, Ids, Labels
from softmax_jax._masses import ROUNDING
from softmax_jax._sharding import Names, PyTree, checks_varying, varying
from softmax_jax._source import Source
from softmax_jax._sparse_labels import Sparse, SparseLabels

Reduction = Literal["mean", "sum", "none"]
Kind = Literal["logits", "probabilities", "states"]  # of what a teacher gives


class Options(NamedTuple):
    """The options of a function, first as they were given, then as arrays; None where one is neutral and its path
    absent."""

    where: Any = None  # broadcastable to the logits, of their rank
    weights: Any = None  # the batch shape
    ignore_index: Any = None
    class_weights: Any = None  # broadcastable to the logits, of their rank
    label_smoothing: Any = None  # scalars, as are those that follow
    z_loss: Any = None
    logit_scale: Any = None
    softcap: Any = None


def array(name: str, value: Any) -> Array:
    """`value` as an array: it may be NumPy's, a number, or a nested list of numbers."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        got, way_out = f"a {type(value).__name__}", "a JAX or NumPy array of numbers"
        inside = [part for part in ("kernel", "weight", "embedding") if hasattr(value, part)]
        if inside:
            way_out = f"its array, `{name}.{inside[0]}`"
        elif getattr(value, "requires_grad", False):
            got, way_out = f"{got} that needs a gradient", f"`{name}.detach()`"
        elif value is None or hasattr(value, "dtype"):
            got = "None" if value is None else f"dtype {value.dtype}"
        elif isinstance(value, Mapping) and value:
            got, first = f"{got} with keys {list(value)[:5]}", next(iter(value))
            way_out = f"one of its arrays, such as `{name}[{first!r}]`"
        elif isinstance(value, list | tuple):
            got = f"{got} of {', '.join(dict.fromkeys(type(part).__name__ for part in value))}"
            way_out = "one array, or lists of numbers of equal lengths"
        raise TypeError(f"`{name}` must be an array; got {got}. Pass {way_out}.") from None


def class_axis(name: str, shape: tuple[int, ...], axis: Any) -> int:
    """`axis` as an index from 0, for an array that has classes on it."""
    try:
        index = operator.index(axis)
    except TypeError:
        raise TypeError(f"`axis` must be an int, the axis of the classes; got {axis!r}. Pass one axis.") from None
    if not shape:
        raise ValueError(f"`{name}` must have an axis of classes; got {name}.shape=(). Pass one number a class.")
    if not -len(shape) <= index < len(shape):
        raise ValueError(
            f"`axis` is out of range: axis={index} for {name}.shape={shape}. Pass an axis from {-len(shape)} to "
            f"{len(shape) - 1}."
        )
    if shape[index] == 0:
        raise ValueError(f"there are no classes: {name}.shape={shape} is 0 on axis {index}. Pass at least one class.")
    return index % len(shape)


def axes_of(name: str, shape: tuple[int, ...], axis: Any) -> tuple[int, ...]:
    """`axis`, an int, a tuple or None for all, as indices from 0 in the order given."""
    axes = tuple(range(len(shape))) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    try:
        indices = [operator.index(a) for a in axes]
    except TypeError:
        raise TypeError(f"`axis` must be an int, a tuple of ints or None; got {axis!r}.") from None
    if any(not -len(shape) <= a < len(shape) for a in indices):
        way_out = (
            f"Pass axes from {-len(shape)} to {len(shape) - 1}." if shape else "A scalar has none: pass `axis=None`."
        )
        raise ValueError(f"`axis` is out of range: axis={axis} for {name}.shape={shape}. {way_out}")
    indices = tuple(a % len(shape) for a in indices)
    if len(set(indices)) != len(indices):
        raise ValueError(f"`axis` names an axis twice: axis={axis} for {name}.shape={shape}. Name each axis once.")
    return indices


RESHAPE = "Reshape it, or add axes of size 1."


def mask(name: str, where: AnyArray, shape: tuple[int, ...], way_out: str = RESHAPE) -> Array:
    """`where` as a bool array of the rank of `shape`."""
    where = array(name, where)
    if where.dtype != bool:
        raise TypeError(f"`{name}` must be bool; got dtype {where.dtype}. Pass `{name} != 0`.")
    broadcastable(name, where.shape, shape, "the shape", way_out)
    return where.reshape((1,) * (len(shape) - where.ndim) + where.shape)


def class_mask(name: str, where: AnyArray, shape: tuple[int, ...], axis: int) -> Array:
    """`where` of logits of `shape`: which classes exist."""
    where = array(name, where)
    of_tokens = where.shape == shape[:axis] + shape[axis + 1 :]
    return mask(
        name,
        where,
        shape,
        "Which tokens count is said by `weights`, in `label_statistics` by `ignore_index`." if of_tokens else RESHAPE,
    )


def floating(name: str, x: Any) -> Array:
    x = array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be floating; got dtype {x.dtype}. Pass `{name}.astype(jnp.float32)`.")
    return x


def narrowed(labels: Any, ignore_index: Any = None) -> tuple[Any, Any]:
    """(labels, `ignore_index`) of 64 bits as int32, which JAX wraps without x64. What int32 cannot hold is no class: it
    becomes the largest int32, or the smallest where it is to be ignored."""
    if isinstance(labels, SparseLabels):
        return labels._replace(ids=narrowed(labels.ids)[0]), ignore_index
    held, limits = on_host(labels), np.iinfo(np.int32)
    if held is None or held.dtype.kind not in "iu" or held.dtype.itemsize < 8 or jax.config.jax_enable_x64:
        return labels, ignore_index
    ids = np.where((held < limits.min) | (held > limits.max), limits.max, held).astype(np.int32)
    if not isinstance(ignore_index, int | np.integer) or limits.min < ignore_index <= limits.max:
        return ids, ignore_index
    return np.where(held == ignore_index, limits.min, np.where(ids == limits.min, limits.max, ids)), limits.min


def ids_in_range(labels: Any, shape: tuple[int, ...], axis: int, options: Options) -> None:
    """An error for an id that no class has, of a token that counts, in arrays of the host: no device is waited for."""
    ids, where, weights = map(on_host, (labels, *options[:2]))
    known = (where is None) == (options.where is None) and (weights is None) == (options.weights is None)
    if ids is None or not known or ids.dtype.kind not in "iu" or not isinstance(shape[axis], int):
        return
    wrong = (ids < 0) | (ids >= shape[axis])
    if options.ignore_index is not None:
        wrong = wrong & (ids != options.ignore_index)
    if weights is not None:
        wrong = wrong & (weights != 0)
    if where is not None:
        wrong = wrong & where.reshape((1,) * (len(shape) - where.ndim) + where.shape).any(axis)
    if wrong.any():
        first = tuple(map(int, np.argwhere(wrong)[0]))
        raise ValueError(
            f"`labels` must be class ids from 0 to {shape[axis] - 1}; got {ids[first]} at {first}. Name an id that is "
            "not to count by `ignore_index`, or give its token the weight 0."
        )


def labels_of(labels: Any, logits_shape: tuple[int, ...], axis: int) -> Labels:
    """What labels they are: integers in the batch shape, floats in the logits' shape or SparseLabels. Nothing is
    broadcast, nothing guessed."""
    batch = logits_shape[:axis] + logits_shape[axis + 1 :]
    if isinstance(labels, SparseLabels):
        return Sparse(*_sparse_labels(labels, batch))
    if labels is None:
        raise TypeError(
            f"`labels` must be integers (class ids) or floats (probabilities); got None. Pass ids of shape {batch}, or "
            f"probabilities of shape {logits_shape}."
        )
    labels = array("labels", labels)
    integer = jnp.issubdtype(labels.dtype, jnp.integer)
    if not integer and not jnp.issubdtype(labels.dtype, jnp.floating):
        raise TypeError(
            f"`labels` must be integers (class ids) or floats (probabilities); got dtype {labels.dtype}. "
            "Pass `labels.astype(jnp.int32)` for ids or `labels.astype(jnp.float32)` for a one-hot mask."
        )
    kind, expected = ("integer", batch) if integer else ("floating", logits_shape)
    if labels.shape != expected:
        fits = [a for a in range(len(logits_shape)) if labels.shape == logits_shape[:a] + logits_shape[a + 1 :]]
        raise ValueError(
            f"{kind} `labels` must have shape {expected}; got labels.shape={labels.shape} for logits of shape "
            f"{logits_shape} with the classes on axis {axis}. Class ids are integers of shape {batch}; probabilities "
            f"are floats of shape {logits_shape}: cast `labels` to the kind that you mean, or reshape it."
            + (f" They fit classes on axis {fits[0]}." if integer and fits else "")
        )
    return Ids(labels) if integer else Dense(labels)


def ids_of(labels: Any, logits_shape: tuple[int, ...], axis: int, beside: str = "") -> Any:
    """`labels_of`, for what takes ids alone."""
    of = "SparseLabels" if isinstance(labels, SparseLabels) else None
    if of is None and labels is not None:
        labels = array("labels", labels)
        of = None if jnp.issubdtype(labels.dtype, jnp.integer) else f"dtype {labels.dtype}"
    if of is not None:
        raise TypeError(f"`labels`{beside} must be integers; got {of}. Pass class ids.")
    return labels_of(labels, logits_shape, axis)


def _sparse_labels(labels: SparseLabels, batch: tuple[int, ...]) -> SparseLabels:
    ids, probs = array("ids", labels.ids), array("probs", labels.probs)
    others = None if labels.others is None else array("others", labels.others)
    floats = (probs,) if others is None else (probs, others)
    if not jnp.issubdtype(ids.dtype, jnp.integer) or not all(jnp.issubdtype(a.dtype, jnp.floating) for a in floats):
        raise TypeError(
            f"`SparseLabels` must have integer ids and floating probabilities; got {[a.dtype for a in (ids, *floats)]}"
            " for ids, probs, others. Cast them."
        )
    fits = ids.ndim == len(batch) + 1 and ids.shape[:-1] == batch and probs.shape == ids.shape
    if not fits or (others is not None and others.shape != batch):
        raise ValueError(
            f"`SparseLabels` must have ids and probs of shape (*batch, k) and others of the batch shape, {batch} here; "
            f"got {[a.shape for a in (ids, *floats)]} for ids, probs, others. Reshape them."
        )
    return SparseLabels(ids, probs, others)


def probabilities(teacher_probs: Any, axis: int, where: Any, weights: Any) -> None:
    """An error for a negative one, of what counts, in arrays of the host, which is looked through; no device is waited
    for. Ids that a row has twice add up: those are left to the sums. What does not fit is refused elsewhere."""
    sparse = isinstance(teacher_probs, SparseLabels)
    parts: dict[str, Any] = {"teacher_probs": teacher_probs}
    if sparse:
        parts = {"teacher_probs.probs": teacher_probs.probs, "teacher_probs.others": teacher_probs.others}
    held = [on_host(mask) for mask in (where, weights)]
    if [mask is None for mask in held] != [mask is None for mask in (where, weights)] or (sparse and where is not None):
        return
    for name, value in parts.items():
        probs = on_host(value)
        if probs is None or not np.any(negative := probs < -ROUNDING):
            continue
        try:
            negative = negative & _counted(name, negative.shape, axis, *held)
        except ValueError:
            return
        for first in (tuple(map(int, index)) for index in np.argwhere(negative)):
            ids = on_host(teacher_probs.ids) if name == "teacher_probs.probs" else None
            if ids is not None and np.sum(ids[first[:-1]] == ids[first]) > 1:
                continue
            raise ValueError(
                f"`{name}` must not be negative; got {float(probs[first])} at {first}. Of what a subtraction left pass "
                "`np.maximum(..., 0)`."
            )


def _counted(name: str, shape: tuple[int, ...], axis: int, where: Any, weights: Any) -> Any:
    """Which entries count, by masks of the host."""
    counted = np.ones(shape, bool) if where is None else np.broadcast_to(where, shape)
    if weights is None:
        return counted
    if name == "teacher_probs.others":
        return counted & np.broadcast_to(weights != 0, shape)
    axis = axis if name == "teacher_probs" else len(shape) - 1
    batch = shape[:axis] + shape[axis + 1 :]
    return counted & np.expand_dims(np.broadcast_to(weights != 0, batch), axis)


def on_host(value: Any) -> np.ndarray | None:
    """What is NumPy's, a number, or nested lists of numbers of equal lengths; None for all else."""
    if value is None or not all(isinstance(leaf, np.ndarray | np.generic | Real) for leaf in jax.tree.leaves(value)):
        return None
    try:
        return np.asarray(value)
    except ValueError:
        return None


def one_teacher(
    shape: tuple[int, ...],
    axis: int,
    teacher_probs: Any,
    teacher_logits: Any,
    of_states: tuple[Any, Any, Any, bool] = (None, None, None, False),
    dtype: Any = None,
) -> tuple[Kind, Source]:
    """What the one teacher given is, for logits of `shape`."""
    teacher_x, weight, bias, transpose_weight = of_states
    given = {"teacher_probs": teacher_probs, "teacher_logits": teacher_logits, "teacher_x": teacher_x}
    given = [name for name, value in given.items() if value is not None]
    of_head = {"teacher_weight": weight, "teacher_bias": bias, "teacher_transpose_weight": transpose_weight or None}
    of_head = [name for name, value in of_head.items() if value is not None]
    if len(given) != 1 or (teacher_x is None) != (weight is None) or (of_head and weight is None):
        given += of_head
        raise ValueError(
            f"there must be one teacher; got {given or 'none'}. Pass `teacher_probs`, or `teacher_logits`, or to "
            "the linear form `teacher_x` with `teacher_weight`."
        )
    if teacher_x is not None:
        teacher = head(teacher_x, weight, bias, transpose_weight, dtype, "teacher_")
        if teacher.shape != shape:
            raise ValueError(
                f"the teacher's logits must have the student's shape {shape}; got {teacher.shape} from teacher_x.shape="
                f"{teacher.x.shape}, teacher_weight.shape={teacher.weight.shape}. Give both the same tokens, classes."
            )
        return "states", teacher
    if isinstance(teacher_probs, SparseLabels):
        return "probabilities", Source(labels_of(narrowed(teacher_probs)[0], shape, axis))
    if isinstance(teacher_logits, SparseLabels):
        raise TypeError("`teacher_logits` must be an array; got SparseLabels. Pass those as `teacher_probs`.")
    teacher = floating(given[0], teacher_probs if teacher_logits is None else teacher_logits)
    if teacher.shape != shape:
        raise ValueError(
            f"`{given[0]}` must have the shape of the student's logits, {shape}; got {given[0]}.shape={teacher.shape}. "
            "Reshape it, or pass `SparseLabels` for a few classes a token."
        )
    return "probabilities" if teacher_logits is None else "logits", Source(Dense(teacher))


def mixture(name: str, value: Any, dtype: Any) -> tuple[bool, Array | np.ndarray | None]:
    """(whether it is 1, the number between 0 and 1). Of traced numbers the ends are NaN."""
    concrete = isinstance(value, np.ndarray | Array) and not isinstance(value, Tracer) and value.shape == ()
    number = scalar(name, value.item() if concrete else value, dtype, 0.0, 1.0)
    if isinstance(number, np.ndarray):
        return bool(number == 1), None if number in (0, 1) else number
    return False, nan_unless((number > 0) & (number < 1), number)


def broadcastable(
    name: str, shape: tuple[int, ...], target: tuple[int, ...], what: str, way_out: str = RESHAPE
) -> None:
    fits = len(shape) <= len(target) and all(
        s in (1, t) for s, t in zip(reversed(shape), reversed(target), strict=False)
    )
    if not fits:
        raise ValueError(f"`{name}` must broadcast to {what} {target}; got {name}.shape={shape}. {way_out}")


def scalar(name: str, value: Any, dtype: Any, low: float, high: float, open_low: bool = False) -> Array | np.ndarray:
    """A float option in the accumulator's dtype. Concrete numbers are range-checked; of traced ones, those outside
    the range become NaN."""
    dtype = accumulator(dtype)
    left, right = "(" if open_low or math.isinf(low) else "[", ")" if math.isinf(high) else "]"
    if isinstance(value, bool | np.bool_) or (hasattr(value, "dtype") and value.dtype == np.bool_):
        raise TypeError(f"`{name}` must be a number; got a bool, {value!r}. Pass a number, or leave it out.")
    if isinstance(value, Real | np.floating | np.integer):
        number = float(value)  # pyright: ignore[reportArgumentType]
        if not (low < number if open_low else low <= number) or not number <= high or not math.isfinite(number):
            interval = f"{left}{low}, {high}{right}"
            raise ValueError(
                f"`{name}` must be a finite number in {interval}; got {value!r}. Pass one, or leave it out."
            )
        return np.asarray(number, dtype)
    value = array(name, value)
    if value.shape != () or jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise ValueError(
            f"`{name}` must be a scalar; got shape {value.shape}, dtype {value.dtype}. Pass a number or a 0-d array."
        )
    value = value.astype(dtype)
    inside = ((value > low) if open_low else (value >= low)) & (value <= high)
    return value if math.isinf(low) and math.isinf(high) else nan_unless(inside, value)


def unless(neutral: Any, name: str, value: Any, dtype: Any, low: float, high: float, open_low: bool = False):
    """None for the neutral Python number (its path is then absent), else the checked scalar."""
    if value is None or (isinstance(value, Real) and not isinstance(value, bool) and value == neutral):
        return None
    return scalar(name, value, dtype, low, high, open_low)


def ignored_id(ignore_index: Any, labels: Labels | None) -> np.ndarray | None:
    """`ignore_index` in the labels' dtype; None where no label can equal it."""
    if ignore_index is None:
        return None
    if not isinstance(labels, Ids):
        kind = f"labels of dtype {labels.values.dtype}" if isinstance(labels, Dense) else "SparseLabels"
        raise ValueError(
            f"`ignore_index` goes with integer labels; got ignore_index={ignore_index!r} and {kind}. "
            "Give those tokens weight 0 with `weights` instead."
        )
    try:
        index = operator.index(ignore_index)
    except TypeError:
        raise TypeError(f"`ignore_index` must be an int; got {ignore_index!r}. Use `weights` for a mask.") from None
    dtype = labels.ids.dtype
    limits = jnp.iinfo(dtype)
    return np.asarray(index, dtype) if limits.min <= index <= limits.max else None


def options_for(shape: tuple[int, ...], dtype: Any, axis: int, labels: Labels | None, options: Options) -> Options:
    """The options of logits of `shape` and `dtype`, checked; the neutral ones None."""
    where, weights, ignore_index, class_weights, label_smoothing, z_loss, logit_scale, softcap = options
    batch = shape[:axis] + shape[axis + 1 :]
    if where is not None:
        where = class_mask("where", where, shape, axis)
    if weights is not None:
        weights = array("weights", weights)
        if jnp.issubdtype(weights.dtype, jnp.complexfloating):
            raise TypeError(f"`weights` must be bool, integer or floating; got {weights.dtype}. Pass its `.real`.")
        of_classes = weights.shape == (shape[axis],)
        way_out = "One number a class is `class_weights`, of the cross-entropies." if of_classes else RESHAPE
        broadcastable("weights", weights.shape, batch, "the batch shape", way_out)
    if class_weights is not None:
        class_weights = array("class_weights", class_weights)
        if class_weights.shape != (shape[axis],) or jnp.issubdtype(class_weights.dtype, jnp.complexfloating):
            raise ValueError(
                f"`class_weights` must hold one real number a class, shape {(shape[axis],)}; got class_weights.shape="
                f"{class_weights.shape}, dtype {class_weights.dtype}, for logits of shape {shape} with the classes on "
                f"axis {axis}. Use `weights` for one number a token."
            )
    inf = math.inf
    return Options(
        where=where,
        weights=weights,
        ignore_index=ignored_id(ignore_index, labels),
        class_weights=class_weights,
        label_smoothing=unless(0, "label_smoothing", label_smoothing, dtype, 0.0, 1.0),
        z_loss=unless(0, "z_loss", z_loss, dtype, -inf, inf),
        logit_scale=unless(1, "logit_scale", logit_scale, dtype, -inf, inf),
        softcap=unless(None, "softcap", softcap, dtype, 0.0, inf, open_low=True),
    )


def reduction_of(reduction: Any, normalizer: Any, dtype: Any) -> Array | np.ndarray | None:
    """The checked normalizer."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"`reduction` must be 'mean', 'sum' or 'none'; got {reduction!r}.")
    if normalizer is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f"`normalizer` replaces the divisor of the mean; got reduction={reduction!r}, normalizer={normalizer}. "
            "Pass reduction='mean', or divide the result yourself."
        )
    return scalar("normalizer", normalizer, dtype, -math.inf, math.inf)


def mesh_axes(axis_name: Any) -> Names:
    """`axis_name`, a name, several or None, as the tuple of mesh axes that the classes are sharded over."""
    axes = () if axis_name is None else tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    if len(set(axes)) != len(axes):
        raise ValueError(f"`axis_name` names a mesh axis twice: {axis_name!r}. Name each axis once.")
    try:
        checks_varying(axes)
    except (NameError, TypeError, ValueError, KeyError):
        raise ValueError(
            f"`axis_name` must name mesh axes of the `jax.shard_map` around the call; got {axis_name!r}. Call it "
            "inside one, or leave `axis_name` out: under `jit` sharded classes need none."
        ) from None
    return axes


def sharded(name: str, array: PyTree, class_axes: Names) -> None:
    """That `array` holds each device's own classes."""
    same = [axis for axis in class_axes if axis not in varying(array)]
    if same and checks_varying(class_axes):
        raise ValueError(
            f"`{name}` is the same on every device along {same}, yet axis_name={class_axes} says that its classes are "
            f"sharded there. Give `{name}` an in_spec that names {same}, or leave `axis_name` out."
        )


def head(
    x: AnyArray, weight: AnyArray, bias: Any, transpose_weight: bool, dtype: Any = None, prefix: str = ""
) -> Source:
    """Where the logits of a head come from. The names of its operands begin with `prefix`."""
    x, weight = floating(f"{prefix}x", x), floating(f"{prefix}weight", weight)
    head_size(x, weight, bias, transpose_weight, prefix)
    return Source.of_head(x, weight, bias, transpose_weight, multiplied_in(dtype))


def head_size(x: Array, weight: Array, bias: AnyArray | None, transpose_weight: bool, prefix: str) -> None:
    """That `x`, `weight` and `bias` agree."""
    x_name, weight_name, bias_name = (f"{prefix}{name}" for name in ("x", "weight", "bias"))
    layout, other = (
        ("(classes, embed)", "(embed, classes)") if transpose_weight else ("(embed, classes)", "(classes, embed)")
    )
    shapes = f"{x_name}.shape={x.shape}, {weight_name}.shape={weight.shape}"
    if weight.ndim != 2 or x.ndim == 0:
        raise ValueError(
            f"`{x_name}` must be (*batch, embed) and `{weight_name}` {layout}; got {shapes}. Reshape them to that."
        )
    classes, embed = weight.shape if transpose_weight else weight.shape[::-1]
    if x.shape[-1] != embed:
        raise ValueError(
            f"`{x_name}` and `{weight_name}` must share the embed axis; got {shapes}. `{weight_name}` is {layout}: "
            f"pass `{prefix}transpose_weight={not transpose_weight}` if yours is {other}."
        )
    if classes == 0:
        raise ValueError(
            f"there are no classes: {weight_name}.shape={weight.shape}, {layout}. Pass at least one class."
        )
    if bias is not None:
        bias = floating(bias_name, bias)
        if bias.shape != (classes,):
            raise ValueError(
                f"`{bias_name}` must hold one number a class, {(classes,)}; got {bias_name}.shape={bias.shape}, "
                f"{weight_name}.shape={weight.shape}, {layout}. Reshape it."
            )


def multiplied_in(dtype: Any) -> Any:
    """The `dtype` of a head's product; None for the promotion of its operands."""
    if dtype is None:
        return None
    try:
        found = jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:
        raise TypeError(f"`dtype` must be a dtype; got {dtype!r}. Pass jnp.bfloat16, say, or None.") from None
    if found not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
        raise TypeError(
            f"`dtype` must be floating, of 16 bits or more; got {dtype!r}. Pass jnp.bfloat16, say, or None."
        )
    return found


def fixed_sizes(batch: tuple[Any, ...], embed: Any, classes: Any, chunk_size: int | None) -> None:
    """That the number of chunks can be known: sizes may be symbols, as `jax.export` has them."""
    if not all(isinstance(n, int) for n in batch):
        raise ValueError(
            f"tokens go through in chunks of equal size, and their number must be fixed; got a batch of shape {batch}. "
            "Export it with a fixed batch, or use what takes symbolic sizes: `cross_entropy(x @ weight, labels)`, "
            "`label_statistics`, `kl_divergence` with `teacher_logits`."
        )
    if chunk_size is None and not (isinstance(embed, int) and isinstance(classes, int)):
        raise ValueError(
            f"the default `chunk_size` follows from the number of classes and the embed size of a head; got {classes} "
            f"and {embed}. Pass `chunk_size`, the most tokens a chunk may have."
        )


def chunk_size_of(chunk_size: Any) -> int | None:
    if chunk_size is None:
        return None
    try:
        size = operator.index(chunk_size)
    except TypeError:
        raise TypeError(f"`chunk_size` must be an int; got {chunk_size!r}. Pass a number of tokens, or None.") from None
    if size < 1:
        raise ValueError(f"`chunk_size` must be at least 1 token; got {size}. Pass None for the default.")
    return size
