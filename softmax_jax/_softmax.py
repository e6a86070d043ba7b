"""softmax and log_softmax, each with its full Jacobian-vector product as a rule."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import zero_from_primal
from jax.typing import ArrayLike
from jaxtyping import Bool, Num

from softmax_jax import _checks
from softmax_jax._adjustment import Adjustment, adjust, row_shift, shifted
from softmax_jax._arguments import hinted
from softmax_jax._barrier import apart
from softmax_jax._blocks import PLATFORMS, sum_over_classes
from softmax_jax._class_sums import top_sums
from softmax_jax._classes import Classes, classes_last, from_classes_last
from softmax_jax._dtypes import floating, upcast
from softmax_jax._fold import SHORT, by_neighbours, reduced
from softmax_jax._linear_map import linear_map
from softmax_jax._masses import existing
from softmax_jax._sharding import vary_alike
from softmax_jax._token_loss import negative_log_likelihood

Axes = tuple[int, ...]
Kept = tuple[Array, Array, Array]  # (m, a, nll) of each row
Given = tuple[Array, Array | None, Kept]  # (x, where, kept)


@hinted
def softmax(
    x: Num[ArrayLike, "..."], axis: int | Axes | None = -1, where: Bool[ArrayLike, "..."] | None = None
) -> Num[Array, "..."]:
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
def log_softmax(
    x: Num[ArrayLike, "..."], axis: int | Axes | None = -1, where: Bool[ArrayLike, "..."] | None = None
) -> Num[Array, "..."]:
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


def _operands(x: ArrayLike, axis: int | Axes | None, where: ArrayLike | None) -> tuple[Array, Array | None, Axes]:
    x = _checks.array("x", x)
    if x.dtype == bool or jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"`x` must be real; got dtype {x.dtype}. Pass `x.astype(jnp.float32)`, or the part you mean.")
    axes = _checks.axes_of("x", x.shape, axis)
    if where is not None:
        where = _checks.mask("where", where, x.shape)
    return *vary_alike(floating(x), where), axes


# y = exp(x - m) / Σ exp(x - m), and with the whole Jacobian ∂y_v/∂x_u = y_v (δ_uv - y_u), of a tangent or cotangent g,
#
#     (J g)_v = y_v (g_v - Σ_u g_u y_u)
#
# which cancels where y_v → 1. Since Σ y = 1, the same holds of g - c for any number c of the row. With c = Σ g y as it
# is rounded, g - c at such a v is exact and no larger than Σ_{u≠v} |g_u - g_v| y_u and a rounding of c, so that the
# second difference loses a rounding of that alone. In one pass c is g of the class that has y > 1/2, 0 in a row
# without any: as exact as if each g had been rounded.

KERNEL = 2**14
"""Entries of a row, up to which XLA makes one kernel of a softmax on a GPU."""


def _size(x: Array, axes: Axes) -> int:
    """Of the rows, 0 where a fold is not for them."""
    size = x.shape[axes[0]] if len(axes) == 1 else 0
    return size if isinstance(size, int) else 0


def _by_platform(plain: Callable, by_fold: Callable, *operands: Any, gpu: bool) -> Any:
    """The fold where the sums are made in one pass, on a GPU only where that is said to gain by it."""
    platforms = PLATFORMS if gpu else (*PLATFORMS, "cuda", "rocm")
    return lax.platform_dependent(*operands, default=by_fold, **dict.fromkeys(platforms, plain))


def _softmax_value(x: Array, where: Array | None, axes: Axes) -> Array:
    masked = Adjustment(where=where)

    def plain(x):
        e = jnp.exp(shifted(x, masked, row_shift(adjust(x, masked), axes), axes))
        return e, jnp.sum(e, axes, keepdims=True)

    def by_fold(x):
        m, top, rest = top_sums(x, masked, Classes(axes[0]))
        own = jnp.exp(_highest(x, m, top, Classes(axes[0])) - m)  # 1, with its slope
        total = jnp.where(top < x.shape[axes[0]], own + rest, rest)
        return jnp.exp(shifted(x, masked, m, axes)), jnp.expand_dims(total, axes)

    size = _size(x, axes)
    e, total = plain(x) if not size or size < SHORT else _by_platform(plain, by_fold, x, gpu=size > KERNEL)
    if where is not None:
        total = jnp.where(jnp.any(where, axes, keepdims=True), total, 1)
    y = e / total
    return (y if where is None else jnp.where(where, y, 0)).astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _softmax_rule(x: Array, where: Array | None, axes: Axes) -> Array:
    return _softmax_value(x, where, axes)


@_softmax_rule.defjvp
def _softmax_jvp(axes, primals, tangents):
    y, jacobian = _softmax_rule(*primals, axes), partial(_times_jacobian, axes)
    return y, linear_map(jacobian, jacobian, (y, primals[1]), y, y, tangents[0])  # it is symmetric


def _times_jacobian(axes: Axes, given: tuple[Array, Array | None], g: Array) -> Array:
    y, where = given
    return _sloped(y, existing(g, where), axes).astype(y.dtype)


def _around_mean(y: Array, g: Array, axes: Axes) -> Array:
    p, g = upcast(y), upcast(g)
    g = g - jnp.sum(g * p, axes, keepdims=True)
    return p * (g - jnp.sum(g * p, axes, keepdims=True))


def _around_top(y: Array, g: Array, axes: Axes) -> Array:
    if y.dtype.itemsize < 4:  # else XLA on a GPU keeps a float32 copy for the two passes (H200: 11 reads, not 8)
        y = lax.platform_dependent(y, tpu=lambda y: y, default=lambda y: apart(y)[0])
    of_row = by_neighbours(partial(_mean_around_top, axis=axes[0]), axes[0], 1, y, y, g)
    c, mean = (jnp.expand_dims(of_row, axes) for of_row in of_row)
    return upcast(y) * ((upcast(g) - c) - mean)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _sloped(y: Array, g: Array, axes: Axes) -> Array:
    """J g, of which the two ways have one derivative, that of the first."""
    around_mean, around_top = (partial(f, axes=axes) for f in (_around_mean, _around_top))
    if not _size(y, axes):
        return around_mean(y, g)
    return _by_platform(around_mean, around_top, y, g, gpu=axes[0] == y.ndim - 1)  # columns XLA writes out there


@_sloped.defjvp
def _sloped_jvp(axes, primals, tangents):
    return _sloped(*primals, axes), jax.jvp(partial(_around_mean, axes=axes), primals, tangents)[1]


def _mean_around_top(y: Array, g: Array, *, axis: int, parts: int, step: int) -> tuple[Array, Array]:
    """(c, Σ y (g - c) / Σ y) with c = g where y > 1/2, if that is anywhere, else 0, in one pass: no difference loses
    more there than above. Kept in 16 bits, y sums to 1 but for their rounding."""

    def join(a, b):
        """Of two sets: the largest y, c there, Σ y, Σ y (g - c)."""
        high, low = (jax.tree.map(partial(jnp.where, a[0] >= b[0]), *pair) for pair in ((a, b), (b, a)))
        return high[0], high[1], high[2] + low[2], high[3] + low[3] + low[2] * (low[1] - high[1])

    p, g = upcast(y), upcast(g)
    c, zero = jnp.where(p > 0.5, g, 0), jnp.zeros((), p.dtype)
    _, c, total, mean = reduced(join, (p, c, p, p * (g - c)), (zero - 1, zero, zero, zero), axis, parts)
    return c, mean / jnp.where(total > 0, total, 1)


_jitted_softmax = jax.jit(_softmax_rule, static_argnums=2)


# The sums of the loss around the largest entry a, rest = Σ_{v≠a} exp(x_v - m) and own = x_a - m = 0 give
#
#     y_a = -nll(rest, own)                      y_v = (x_v - x_a) - nll
#     dy_v = (dx_v - dx_a) - dnll                dnll = Σ_v p_v (dx_v - dx_a)
#     backwards, of the cotangent g:             g_v (1 - p_v) - p_v (Σ_u g_u - g_v)
#
# where 1 - p_a = -expm1(-nll) does not cancel. Kept: x, and of each row m, a and nll. Several axes are made one.


def _log_softmax_value(x: Array, where: Array | None, classes: Classes) -> tuple[Array, Kept]:
    axis, (m, top, rest) = classes.axis, top_sums(x, Adjustment(where=where), classes)
    highest = _highest(x, m, top, classes)
    nll = negative_log_likelihood(rest, jnp.where(top < x.shape[axis], highest - m, -jnp.inf))
    nll = nll if where is None else jnp.where(jnp.any(where, axis), nll, 0)
    kept = apart(m, top, nll)
    at_top, nll, log_p = _log_p(x, where, highest, kept, classes)
    y = jnp.where(at_top, -nll, log_p)
    return (y if where is None else jnp.where(where, y, -jnp.inf)).astype(x.dtype), kept


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _highest(x: Array, m: Array, top: Array, classes: Classes) -> Array:
    """x_a: m, with the slope of x_a, for second derivatives."""
    return m


@_highest.defjvp
def _highest_jvp(classes, primals, tangents):
    x, m, top = primals
    return m, _at_top(upcast(tangents[0]), top, classes)


def _at_top(v: Array, top: Array, classes: Classes) -> Array:
    return jnp.sum(jnp.where(classes.is_at(top, v), v, 0), classes.axis)


def _log_p(x: Array, where: Array | None, highest: Array, kept: Kept, classes: Classes) -> tuple[Array, Array, Array]:
    """Where the top is, its nll, and log p_v elsewhere."""
    _, top, nll = kept
    log_p = shifted(x, Adjustment(where=where), highest, classes.axis) - classes.along(nll)
    return classes.is_at(top, x), classes.along(nll), log_p


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _log_softmax_rule(x: Array, where: Array | None, classes: Classes) -> tuple[Array, Kept]:
    """(y, (m, a, nll) of each row)."""
    return _log_softmax_value(x, where, classes)


def _log_softmax_jvp(classes, primals, tangents):
    y, kept = _log_softmax_rule(*primals, classes)
    m, top, _ = kept
    given, dx = (*primals, kept), tangents[0]
    f, transposed = partial(_log_softmax_tangent, classes), partial(_log_softmax_cotangent, classes)
    dy = linear_map(f, transposed, given, primals[0], y, dx)
    dkept = jnp.zeros_like(m), zero_from_primal(top, symbolic_zeros=True), _from_top(classes, given, dx)[1]
    return (y, kept), (dy, dkept)


_log_softmax_rule.defjvp(_log_softmax_jvp, symbolic_zeros=True)


def _probabilities(classes: Classes, x: Array, where: Array | None, kept: Kept) -> tuple[Array, Array]:
    """p and 1 - p."""
    at_top, nll, log_p = _log_p(x, where, _highest(x, *kept[:2], classes), kept, classes)
    top_p, top_miss = apart(jnp.exp(-nll), -jnp.expm1(-nll))
    p = jnp.exp(log_p)
    return jnp.where(at_top, top_p, p), jnp.where(at_top, top_miss, 1 - p)


def _from_top(classes: Classes, given: Given, dx: Any) -> tuple[Array, Array]:
    """(dx_v - dx_a, dnll)."""
    x, where, kept = given
    dx = existing(upcast(dx), where)
    dx = dx - classes.along(_at_top(dx, kept[1], classes))
    return dx, jnp.sum(_probabilities(classes, *given)[0] * dx, classes.axis)


def _log_softmax_tangent(classes: Classes, given: Given, dx: Array) -> Array:
    dx, dnll = _from_top(classes, given, dx)
    return existing(dx - classes.along(dnll), given[1]).astype(given[0].dtype)


def _log_softmax_cotangent(classes: Classes, given: Given, g: Array) -> Array:
    x, where, _ = given
    total = classes.along(sum_over_classes(lambda _, g, where: existing(upcast(g), where), classes, g, where))
    (p, miss), g = _probabilities(classes, *given), existing(upcast(g), where)
    return (g * miss - p * (total - g)).astype(x.dtype)


@partial(jax.jit, static_argnums=2)
def _jitted_log_softmax(x: Array, where: Array | None, axes: Axes) -> Array:
    if x.size == 0:
        return x
    where = where if where is None or len(axes) == 1 else classes_last(jnp.broadcast_to(where, x.shape), axes)
    classes = Classes(axes[0] if len(axes) == 1 else x.ndim - len(axes))
    y, _ = _log_softmax_rule(classes_last(x, axes), where, classes)
    return y if len(axes) == 1 else from_classes_last(y, x.shape, axes)
