"""What else one pass over the classes tells of a token: for reinforcement learning, evaluation, calibration."""

from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float

from softmax_jax._core import Settings, compute_of_labels
from softmax_jax._head.product import given_logits, head
from softmax_jax._inputs.arrays import Floats, Integers, Mask, Nested, Scalar, class_axis
from softmax_jax._inputs.hints import hinted
from softmax_jax._inputs.options import Options
from softmax_jax._sums.loss import LabelStatistics, statistics


@hinted
def label_statistics(
    logits: Floats,
    labels: Integers,
    *,
    axis: int = -1,
    where: Mask | None = None,
    ignore_index: int | None = None,
    logit_scale: Scalar = 1.0,
    softcap: Scalar | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    forward_mode: bool = False,
) -> LabelStatistics:
    """What softmax(logits) says of a label, per token.

        log_prob = z_y - log_normalizer = log p_y         log_normalizer = log Σ_v exp(z_v)
        entropy = -Σ_v p_v log p_v, in nats               rank = number of classes v with z_v > z_y
        correct: the label is the largest logit, of equal ones the first; prediction: the class of that

    z are the adjusted logits, as in `cross_entropy`, whose exactness these have, and their gradients: the log_prob and
    the entropy of a confident token do not round to 0. Under `jit` only what is used is computed; kept for the
    backward pass are the logits as they came and a few numbers a token.

    Args:
      logits: floating, `[*batch, classes]` for `axis=-1`. A row that holds +inf or NaN, or whose every logit is
        -inf, gives NaN; -inf is a class of probability zero, which adds 0 to the entropy.
      labels: integer class ids of the batch shape. An id outside `[0, classes)` has log_prob NaN.
      ignore_index: rows with this label are left out: all their numbers are 0, and their gradients.
      axis, where, logit_scale, softcap, axis_name, forward_mode: as in `cross_entropy`. A label that `where` hides has
        log_prob -inf; in a row without any class all numbers are 0.

    Returns:
      `LabelStatistics`. Where log_prob is NaN, `correct` is False and `rank` -1; `prediction` is -1 in a row that is
      NaN itself. Two logits that differ by less than the smallest normal number count as equal.

    Raises:
      TypeError, ValueError: while tracing, for shapes, dtypes and numbers that do not fit; the message says which.

    >>> import jax.numpy as jnp
    >>> from softmax_jax import label_statistics
    >>> logits = jnp.array([[2.0, 1.0, 0.0], [0.0, 30.0, 0.0]])
    >>> statistics = label_statistics(logits, jnp.array([1, 1]))
    >>> [f"{entropy:.5e}" for entropy in statistics.entropy]
    ['8.32396e-01', '5.80173e-12']
    >>> statistics.correct.tolist(), statistics.rank.tolist()
    ([False, True], [1, 0])

    Schulman et al., "Proximal Policy Optimization Algorithms", 2017, arXiv:1707.06347 (the uses of log_prob and
    entropy).
    """
    source = given_logits("logits", logits, labels)
    options = Options(where, ignore_index=ignore_index, logit_scale=logit_scale, softcap=softcap)
    axis = class_axis("logits", source.shape, axis)
    settings = Settings(axis_name=axis_name, forward_mode=forward_mode)
    return compute_of_labels(statistics, source, labels, options, settings, axis, only_ids="")[0]


@hinted
def linear_label_statistics(
    x: Float[ArrayLike, "*batch embed"] | Nested,
    weight: Float[ArrayLike, "_ _"] | Nested,
    labels: Integers,
    *,
    bias: Float[ArrayLike, " classes"] | Nested | None = None,
    transpose_weight: bool = False,
    where: Mask | None = None,
    ignore_index: int | None = None,
    logit_scale: Scalar = 1.0,
    softcap: Scalar | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    dtype: DTypeLike | None = None,
    chunk_size: int | None = None,
    forward_mode: bool = False,
) -> LabelStatistics:
    """`label_statistics(x @ weight + bias, labels, ...)` without ever holding the logits, as `linear_cross_entropy`.

    Its backward pass makes each chunk's logits again. The arguments are those of the two.

    >>> import jax.numpy as jnp
    >>> from softmax_jax import linear_label_statistics
    >>> x, weight = jnp.eye(3, 4), jnp.arange(20.0).reshape(4, 5)
    >>> linear_label_statistics(x, weight, jnp.array([0, 4, 2])).rank.tolist()
    [4, 0, 2]
    """
    source = head(x, weight, bias, transpose_weight, dtype)
    options = Options(where, ignore_index=ignore_index, logit_scale=logit_scale, softcap=softcap)
    settings = Settings(axis_name=axis_name, chunk_size=chunk_size, forward_mode=forward_mode)
    return compute_of_labels(statistics, source, labels, options, settings, len(source.shape) - 1, only_ids="")[0]
