"""softmax and log_softmax: each a `custom_jvp`, written around the largest entry, which JAX turns into the gradient."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Num

from softmax_jax._devices import AxisNames, Classes, pmax, vary_alike
from softmax_jax._inputs.arrays import (
    AnyArray,
    Axes,
    Mask,
    Numbers,
    array,
    axes_of,
    classes_last,
    from_classes_last,
    is_floating,
    mask,
    nan_unless,
    upcast,
)
from softmax_jax._inputs.hints import hinted
from softmax_jax._inputs.options import Adjustment, adjust, shifted, without_fma, zero_hidden
from softmax_jax._sums.blocks import on_cpu_or_elsewhere
from softmax_jax._sums.fold import sums_in_one_pass
from softmax_jax._sums.rule import finish_rows, top_sums
from softmax_jax._sums.waist import ClassSums, Tokens
from softmax_jax._transforms import barrier


@hinted
def softmax(x: Numbers, axis: int | Axes | None = -1, where: Mask | None = None) -> Num[Array, "..."]:
    """softmax(x)_v = exp(x_v) / Σ_u exp(x_u), over `axis`: same signature and values as `jax.nn.softmax`.

    float32 inside for 16-bit inputs, the input's dtype outside. Derivatives, in both modes, are y · (g - Σ g·y) of the
    tangent or cotangent g, whose difference does not cancel where y → 1; the backward pass keeps the result y alone.

    Args:
      x: of any shape; integers count as float32. -inf has probability zero; a row that holds +inf or NaN, or
        whose every entry is -inf, is NaN.
      axis: an int, a tuple, or None for all axes.
      where: bool, broadcastable to `x`; False: left out, with result 0. A row without any entry is all 0.

    Raises:
      TypeError, ValueError: for an axis out of range, and for bools and complex numbers.

    >>> import jax.numpy as jnp
    >>> from softmax_jax import softmax
    >>> softmax(jnp.array([0.0, 1000.0, -jnp.inf])).tolist()
    [0.0, 1.0, 0.0]

    Bridle, "Probabilistic Interpretation of Feedforward Classification Network Outputs", 1990.
    """
    return _jitted_softmax(*_operands(x, axis, where))


@hinted
def log_softmax(x: Numbers, axis: int | Axes | None = -1, where: Mask | None = None) -> Num[Array, "..."]:
    """log_softmax(x)_v = x_v - log Σ_u exp(x_u), over `axis`: same signature and values as `jax.nn.log_softmax`.

    Exact at the top too: the largest class a of a row has log-probability -log1p(Σ_{v≠a} exp(x_v - x_a)), which
    does not round to 0 when its probability rounds to 1. float32 inside for 16-bit inputs, the input's dtype
    outside. Derivatives are exact there in both modes; the backward pass, dx = g - softmax(x) · Σ g, keeps the input
    and three numbers a row.

    Args:
      x: of any shape; integers count as float32. -inf has log-probability -inf; a row that holds +inf or NaN, or
        whose every entry is -inf, is NaN.
      axis: an int, a tuple, or None for all axes.
      where: bool, broadcastable to `x`; False: left out, with result -inf.

    Raises:
      TypeError, ValueError: for an axis out of range, and for bools and complex numbers.

    >>> import jax.numpy as jnp
    >>> from softmax_jax import log_softmax
    >>> f"{log_softmax(jnp.array([30.0, 0.0]))[0]:.6e}"
    '-9.357623e-14'
    """
    return _jitted_log_softmax(*_operands(x, axis, where))


def _operands(x: AnyArray, axis: int | Axes | None, where: AnyArray | None) -> tuple[Array, Array | None, Axes]:
    x = array("x", x)
    if x.dtype == bool or jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"`x` must be real; got dtype {x.dtype}. Pass `x.astype(jnp.float32)`, or the part you mean.")
    axes = axes_of("x", x.shape, axis)
    if where is not None:
        where = mask("where", where, x.shape)
    return *vary_alike(_as_floating(x), where), axes


def row_max_of(z: Array, axis: int | tuple[int, ...], over: AxisNames = ()) -> Array:
    """m = max_v z_v as a constant; 0 for a row whose every logit is -inf, since -inf - -inf is NaN."""
    highest = pmax(upcast(jnp.max(z, axis=axis, initial=-jnp.inf)), over)
    return jnp.where(highest == -jnp.inf, 0, highest)


def _as_floating(x: Array) -> Array:
    """`x`, or its float32 copy (float64 of 64 bits) where it holds integers, as `jax.nn` has it."""
    if is_floating(x):
        return x
    return x.astype(jnp.float64 if x.dtype.itemsize == 8 else jnp.float32)


# y = exp(x - m) / Σ exp(x - m) has the tangent
#
#     dy = w - y Σ w        w_v = y_v dx_v
#
# which cancels where y_v → 1. There are two ways around that, each of which JAX turns into a gradient that is as exact.
# (1) w - y Σ w is a projection, since Σ y = 1: done twice it is the same, and what the first difference lost at that
# class, the second takes out. (2) For at most one class a, y_a > 1/2. Since Σ dy = 0, it is there
#
#     dy_a = (1 - y_a) M - S       M = Σ_v y_v dx_v        S = Σ_{v≠a} y_v dx_v        1 - y_a = Σ_{v≠a} y_v
#
# of sums of one pass that lose nothing. In a row without such a class it is as if dx_a were 0. Kept in 16 bits, y sums
# to 1 but for their rounding: M is divided by that sum. The CPU has (1), since XLA there writes out what is selected
# before it is summed (with (2) a gradient of 4096 x 8192 takes 2.5 times as long, and four copies). All other platforms
# have (2): they read y and dx once less (attention on a TPU v6e moves 12 units, 27 with (1)). Kept: y alone.

KERNEL = 2**14
"""Entries of a row, up to which XLA makes one kernel of a softmax on a GPU. (Of columns it makes three, which read x
three times; the sums of 16-bit ones are a pass less.)"""


@partial(jax.jit, static_argnums=2, inline=True)  # the rule and its function make the same: one trace serves both
def _softmax_value(x: Array, where: Array | None, axes: Axes) -> Array:
    masked = Adjustment(where=where)

    def plain(x: Array) -> tuple[Array, Array]:
        e = jnp.exp(shifted(x, masked, row_max_of(adjust(x, masked), axes), axes))
        return e, jnp.sum(e, axes, keepdims=True)

    def in_one_pass(x: Array) -> tuple[Array, Array]:
        m, rest, exists = finish_rows(sums_in_one_pass(Tokens(x, None, masked, classes=Classes(axes[0])), axis=axes[0]))
        return jnp.exp(without_fma(upcast(adjust(x, masked)), m) - m), jnp.where(exists, 1 + rest, rest)

    size, wide = x.shape[axes[0]], x.dtype.itemsize >= 4
    plain_on_gpu = isinstance(size, int) and (size <= KERNEL if axes[0] == x.ndim - 1 else wide)
    if len(axes) > 1:
        e, total = plain(x)
    else:
        on_gpu = dict.fromkeys(("cuda", "rocm"), plain) if plain_on_gpu else {}
        e, total = on_cpu_or_elsewhere(plain, partial(lax.platform_dependent, default=in_one_pass, **on_gpu), x)
    if where is not None:
        total = jnp.where(jnp.any(where, axes, keepdims=True), total, 1)
    return zero_hidden(e / total, where).astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _softmax_rule(x: Array, where: Array | None, axes: Axes) -> Array:
    return _softmax_value(x, where, axes)


@_softmax_rule.defjvp
def _softmax_jvp(axes: Axes, primals: tuple, tangents: tuple) -> tuple:
    y = _softmax_rule(*primals, axes)
    return y, _softmax_tangent(y, primals[1], tangents[0], axes)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=3)
def _softmax_tangent(y: Array, where: Array | None, dx: Array, axes: Axes) -> Array:
    # As it is kept, not as it was before: XLA on a GPU would keep that (attention on an H200: 18 units, not 14).
    y = lax.platform_dependent(y, tpu=lambda y: y, default=lambda y: barrier(y)[0])
    dx = zero_hidden(upcast(dx), where)
    twice, around_top = partial(_softmax_projected, axes=axes), partial(_softmax_around_top, axes=axes)
    dy = on_cpu_or_elsewhere(twice, around_top, upcast(y), dx)
    return zero_hidden(dy, where).astype(y.dtype)


def _softmax_projected(p: Array, dx: Array, axes: Axes) -> Array:
    dy = p * dx
    for _ in range(2):
        dy = dy - p * jnp.sum(dy, axes, keepdims=True)
    return dy


def _softmax_around_top(p: Array, dx: Array, axes: Axes) -> Array:
    total, here = partial(jnp.sum, axis=axes, keepdims=True), p > 0.5
    others, top = jnp.where(here, 0, p), total(jnp.where(here, p, 0))
    miss, terms = total(others), others * dx
    every = jnp.where(top + miss == 0, 1, top + miss)  # 0 where all are hidden, or rounded to 0 in 8 bits
    mean = (top * total(jnp.where(here, dx, 0)) + total(terms)) / every
    of_top = miss * mean - total(terms)
    return jnp.where(here, of_top, terms - others * mean)


_jitted_softmax = jax.jit(_softmax_rule, static_argnums=2)


# With a the largest entry and rest = Σ_{v≠a} exp(x_v - x_a)
#
#     y_v = (x_v - x_a) - log1p(rest)        p_v = exp(x_v - x_a) / (1 + rest)        dy_v = dx_v - Σ_u p_u dx_u
#
# which cancels at a where p_a → 1. Again it is a projection, done twice on the CPU; on all other platforms, with
# 1 - p_a = rest / (1 + rest) and S = Σ_{v≠a} p_v dx_v,
#
#     dy_a = (1 - p_a) dx_a - S      dy_v = dx_v - p_a dx_a - S
#
# Kept: x, and three numbers of each row. Several axes are made one.


def _row_sums(x: Array, where: Array | None, classes: Classes) -> ClassSums:
    row = top_sums(x, Adjustment(where=where), classes)
    hidden = None if where is None else ~jnp.any(where, classes.axis)
    return row._replace(rest=nan_unless(row.pivot < x.shape[classes.axis], row.rest, hidden))


def _total(terms: Array, classes: Classes) -> Array:
    return jnp.sum(terms, classes.axis)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _log_softmax_rule(x: Array, where: Array | None, row: ClassSums, classes: Classes) -> Array:
    nll, down = classes.expand(jnp.log1p(row.rest)), shifted(x, Adjustment(where=where), row.row_max, classes.axis)
    # `down` is 0 at the top as it is: but then XLA on a TPU makes two arrays (a policy's step moves 15 units, not 11).
    y = jnp.where(classes.one_hot(row.pivot, x), -nll, down - nll)
    return (y if where is None else jnp.where(where, y, -jnp.inf)).astype(x.dtype)


@_log_softmax_rule.defjvp
def _log_softmax_jvp(classes: Classes, primals: tuple, tangents: tuple) -> tuple:
    return _log_softmax_rule(*primals, classes), _log_softmax_tangent(*primals, tangents[0], classes)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=4)
def _log_softmax_tangent(x: Array, where: Array | None, row: ClassSums, dx: Array, classes: Classes) -> Array:
    z, dx = shifted(x, Adjustment(where=where), row.row_max, classes.axis), zero_hidden(upcast(dx), where)
    twice, around_top = partial(_log_softmax_projected, classes), partial(_log_softmax_around_top, classes)
    dy = on_cpu_or_elsewhere(twice, around_top, z, row, dx)
    return zero_hidden(dy, where).astype(x.dtype)


def _log_softmax_projected(classes: Classes, z: Array, row: ClassSums, dx: Array) -> Array:
    p, dy = jnp.exp(z) / classes.expand(1 + row.rest), dx
    for _ in range(2):
        dy = dy - classes.expand(_total(p * dy, classes))
    return dy


def _log_softmax_around_top(classes: Classes, z: Array, row: ClassSums, dx: Array) -> Array:
    top, miss = 1 / (1 + row.rest), row.rest / (1 + row.rest)
    p = jnp.exp(z) * classes.expand(top)
    # As factors: of a select XLA on a GPU keeps the zeros, at the size of x (65536 x 512 float32: 16 units, not 13).
    others = 1 - classes.one_hot(row.pivot, z).astype(p.dtype)
    of_top, of_others = _total((1 - others) * dx, classes), _total(others * p * dx, classes)
    dy = (1 - others) * classes.expand(miss * of_top) + others * (dx - classes.expand(top * of_top))
    return dy - classes.expand(of_others)


@partial(jax.jit, static_argnums=2)
def _jitted_log_softmax(x: Array, where: Array | None, axes: Axes) -> Array:
    if x.size == 0:
        return x
    where = where if where is None or len(axes) == 1 else classes_last(jnp.broadcast_to(where, x.shape), axes)
    classes, last = Classes(axes[0] if len(axes) == 1 else x.ndim - len(axes)), classes_last(x, axes)
    y = _log_softmax_rule(last, where, _row_sums(last, where, classes), classes)
    return y if len(axes) == 1 else from_classes_last(y, x.shape, axes)
