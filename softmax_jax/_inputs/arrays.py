"""Arrays as they come in: what the functions take, the one policy on number formats, and the checks of one array.

Formats: read in any, compute in float32 (float64 for float64), answer in the operand's. Every check is made while
tracing; its error names the values and ends with the way out.
"""

import math
import operator
from collections.abc import Mapping
from functools import reduce
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Integer, Num

# Arrays of JAX or NumPy, numbers, and nested lists of them.
Nested = list[Any]
Floats = Float[ArrayLike, "..."] | Nested
Integers = Integer[ArrayLike, "..."] | Nested
Numbers = Num[ArrayLike, "..."] | Nested
Mask = Bool[ArrayLike, "..."] | Nested
AnyArray = ArrayLike | Nested
Scalar = Float[ArrayLike, ""] | float | int
Axes = tuple[int, ...]
Shape = tuple[int, ...]


def accumulator(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of losses, sums and accumulators for operands of `dtype`."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def upcast(x: Array) -> Array:
    """`x` in the dtype that its sums are taken in."""
    return x.astype(accumulator(x.dtype))


def product_dtype(a: DTypeLike, b: DTypeLike) -> jnp.dtype:
    """The dtype that two operands of a matrix product are multiplied in: their promotion, also where the user has
    switched implicit promotion off."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def is_floating(a: Any) -> bool:
    """Whether an array, or what tells its dtype, is floating."""
    return jnp.issubdtype(a.dtype, jnp.floating)


def has_range(dtype: DTypeLike) -> bool:
    """Whether the format has float32's range: float16 and the 8-bit ones have not."""
    return float(jnp.finfo(dtype).max) > 1e38


def nan_unless(valid: Array, value: Array, unused: Array | None = None) -> Array:
    """`value`, and NaN where it is neither `valid` nor `unused`. The NaN is inf - inf: under `jax_disable_jit` a
    constant NaN would be an array of its own, at which `jax_debug_nans` stops though no entry of it is used."""
    valid = valid if unused is None else valid | unused
    absent = jnp.where(valid, 0, jnp.inf).astype(value.dtype)
    return jnp.where(valid, value, absent - absent)


def nonfinite_unused(unused: Array | None, numbers: Any) -> Array | None:
    """Which tokens that are not used have numbers that are not finite: nothing may come of them. (Of the others a
    derivative by the weight, which is 0, is asked.) None for none."""
    if unused is None:
        return None
    floats = [n for n in jax.tree.leaves(numbers) if is_floating(n)]
    return reduce(jnp.logical_or, [unused & ~jnp.isfinite(n) for n in floats])


def zero_rows(unused: Array | None, numbers: Any) -> Any:
    """A token's numbers, 0 for those that are not used. Sums are taken out before anything is computed of them, so that
    no NaN of their own comes back."""
    return numbers if unused is None else jax.tree.map(lambda n: jnp.where(unused, jnp.zeros_like(n), n), numbers)


def classes_last(x: Array, axes: Axes) -> Array:
    """Several class axes as one, the last, flat in the order given (a copy, unless they are the last already)."""
    if len(axes) == 1:
        return x
    batch = tuple(a for a in range(x.ndim) if a not in axes)
    flat = math.prod(x.shape[a] for a in axes)
    return x.transpose(batch + axes).reshape(*(x.shape[a] for a in batch), flat)


def from_classes_last(y: Array, shape: Shape, axes: Axes) -> Array:
    """The inverse: the same several axes again."""
    there = tuple(a for a in range(len(shape)) if a not in axes) + axes
    return y.reshape([shape[a] for a in there]).transpose([there.index(a) for a in range(len(shape))])


# Checks.

RESHAPE = "Reshape it, or add axes of size 1."


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


def floating(name: str, x: Any, way_out: str | None = None) -> Array:
    x = array(name, x)
    if not is_floating(x):
        way_out = way_out or f"Pass `{name}.astype(jnp.float32)`."
        raise TypeError(f"`{name}` must be floating; got dtype {x.dtype}. {way_out}")
    return x


def on_host(value: Any) -> np.ndarray | None:
    """What is NumPy's, a number, or nested lists of numbers of equal lengths; None for all else."""
    if value is None or not all(isinstance(leaf, np.ndarray | np.generic | Real) for leaf in jax.tree.leaves(value)):
        return None
    try:
        return np.asarray(value)
    except ValueError:
        return None


def integer(name: str, value: Any, way_out: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an int; got {value!r}. {way_out}") from None


def scalar(name: str, value: Any, dtype: DTypeLike, low: float, high: float, above: bool = False) -> Array | np.ndarray:
    """A float option in the accumulator's dtype, from `low` on, or `above` it. A concrete number out of the range is an
    error, a traced one becomes NaN."""
    dtype = accumulator(dtype)
    if isinstance(value, bool | np.bool_) or (hasattr(value, "dtype") and value.dtype == np.bool_):
        raise TypeError(f"`{name}` must be a number; got a bool, {value!r}. Pass a number, or leave it out.")
    if isinstance(value, Real | np.floating | np.integer):
        number = float(value)  # pyright: ignore[reportArgumentType]
        if not (low < number if above else low <= number) or not number <= high or not math.isfinite(number):
            interval = f"{'(' if above or math.isinf(low) else '['}{low}, {high}{')' if math.isinf(high) else ']'}"
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
    inside = ((value > low) if above else (value >= low)) & (value <= high)
    return value if math.isinf(low) and math.isinf(high) else nan_unless(inside, value)


def axes_of(name: str, shape: Shape, axis: Any) -> Axes:
    """`axis`, an int, a tuple or None for all, as indices from 0 in the order given."""
    given = tuple(range(len(shape))) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = [integer("axis", a, "Pass an int, or a tuple of ints where there may be several.") for a in given]
    if any(not -len(shape) <= a < len(shape) for a in axes):
        way_out = f"Pass an axis from {-len(shape)} to {len(shape) - 1}."
        way_out = way_out if shape else "A scalar has none: pass `axis=None`."
        raise ValueError(f"`axis` is out of range: axis={axis} for {name}.shape={shape}. {way_out}")
    axes = tuple(a % len(shape) for a in axes)
    if len(set(axes)) != len(axes):
        raise ValueError(f"`axis` names an axis twice: axis={axis} for {name}.shape={shape}. Name each axis once.")
    return axes


def class_axis(name: str, shape: Shape, axis: Any) -> int:
    """`axis` as an index from 0, for an array that has classes on it."""
    index = integer("axis", axis, "Pass one axis, that of the classes.")
    if not shape:
        raise ValueError(f"`{name}` must have an axis of classes; got {name}.shape=(). Pass one number a class.")
    (index,) = axes_of(name, shape, index)
    if shape[index] == 0:
        raise ValueError(f"there are no classes: {name}.shape={shape} is 0 on axis {index}. Pass at least one class.")
    return index


def check_broadcastable(name: str, shape: Shape, target: Shape, what: str, way_out: str = RESHAPE) -> None:
    pairs = zip(reversed(shape), reversed(target), strict=False)
    if len(shape) > len(target) or any(size not in (1, of_target) for size, of_target in pairs):
        raise ValueError(f"`{name}` must broadcast to {what} {target}; got {name}.shape={shape}. {way_out}")


def mask(name: str, where: AnyArray, shape: Shape, way_out: str = RESHAPE) -> Array:
    """`where` as a bool array of the rank of `shape`."""
    where = array(name, where)
    if where.dtype != bool:
        raise TypeError(f"`{name}` must be bool; got dtype {where.dtype}. Pass `{name} != 0`.")
    check_broadcastable(name, where.shape, shape, "the shape", way_out)
    return where.reshape((1,) * (len(shape) - where.ndim) + where.shape)


def class_mask(where: AnyArray | None, shape: Shape, axis: int) -> Array | None:
    """`where` of logits of `shape`: which classes exist."""
    if where is None:
        return None
    where = array("where", where)
    if where.shape != shape[:axis] + shape[axis + 1 :]:
        return mask("where", where, shape)
    of_tokens = "Which tokens count is said by `weights`, in `label_statistics` by `ignore_index`."
    return mask("where", where, shape, of_tokens)
