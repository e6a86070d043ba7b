"""Cross-entropy, of logits and of hidden states with a head."""

from typing import Literal, TypedDict, Unpack, overload

from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, Num

from softmax_jax._core import Settings, compute_of_labels
from softmax_jax._head.product import Source, given_logits, head
from softmax_jax._inputs.arrays import AnyArray, Floats, Mask, Nested, Numbers, Scalar, class_axis
from softmax_jax._inputs.hints import hinted
from softmax_jax._inputs.labels import SparseLabels
from softmax_jax._inputs.options import Options, Reduction
from softmax_jax._sums.loss import LabelStatistics, losses_and_statistics, weighted_losses

AnyLabels = Numbers | SparseLabels
Loss = Float[Array, "..."]
LossAndStatistics = tuple[Loss, LabelStatistics]


class LossOptions(TypedDict, total=False):
    """The options that both have, for type checkers: their types follow from `statistics`."""

    where: Mask | None
    weights: AnyArray | None
    ignore_index: int | None
    class_weights: Num[ArrayLike, " classes"] | Nested | None
    label_smoothing: Scalar
    z_loss: Scalar
    logit_scale: Scalar
    softcap: Scalar | None
    reduction: Reduction
    normalizer: ArrayLike | None
    axis_name: str | tuple[str, ...] | None
    forward_mode: bool


class HeadOptions(LossOptions, total=False):
    bias: Float[ArrayLike, " classes"] | Nested | None
    transpose_weight: bool
    dtype: DTypeLike | None
    chunk_size: int | None


@overload
def cross_entropy(
    logits: Floats,
    labels: AnyLabels,
    *,
    axis: int = -1,
    statistics: Literal[False] = False,
    **options: Unpack[LossOptions],
) -> Loss: ...
@overload
def cross_entropy(
    logits: Floats, labels: AnyLabels, *, axis: int = -1, statistics: Literal[True], **options: Unpack[LossOptions]
) -> LossAndStatistics: ...


@hinted
def cross_entropy(
    logits: Floats,
    labels: AnyLabels,
    *,
    axis: int = -1,
    where: Mask | None = None,
    weights: AnyArray | None = None,
    ignore_index: int | None = None,
    class_weights: Num[ArrayLike, " classes"] | Nested | None = None,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    logit_scale: Scalar = 1.0,
    softcap: Scalar | None = None,
    reduction: Reduction = "mean",
    normalizer: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    forward_mode: bool = False,
    statistics: bool = False,
) -> Loss | LossAndStatistics:
    r"""Cross-entropy of softmax(logits) against integer or dense labels, exact in loss and gradient.

        ℓ = Σ_v c_v · target_v · (log_normalizer - z_v)  +  z_loss · log_normalizer²

        z = softcap · tanh(logit_scale · logits / softcap), or logit_scale · logits without a softcap
        log_normalizer = log Σ_v exp(z_v)
        target = (1-ε) · (one-hot or dense label) + ε/K,   ε = label_smoothing, K = number of existing classes

        "none": weights · ℓ      "sum": Σ weights · ℓ
        "mean": Σ weights · ℓ / Σ weights · c_y for integer labels, / Σ weights for dense ones; 0 where that is 0

    The gradient of the mean is the analytic (p - t)/N. Loss and every entry of the gradient are right to a few
    roundings also where p_y → 1 and others round to 0. Kept for the backward pass: the logits as they came, and a few
    numbers a token. Losses are in nats, float32 (float64 for float64 logits); a gradient has its operand's dtype.

    Args:
      logits: floating, `[*batch, classes]` for `axis=-1`. -inf is a class of probability zero; a row that holds +inf
        or NaN, or whose every logit is -inf, gives NaN.
      labels: integers of the batch shape: class ids. Or floats of the logits' shape: probabilities, of any sum.
        Or `SparseLabels`: those of a few classes a token.
        An id outside `[0, classes)` that is not `ignore_index` gives NaN in its row's loss and gradient; in an array
        of NumPy, or a list, it is an error (but NaN where the array is an argument of a `jit` function).
      axis: the axis of the classes.
      where: bool, broadcastable to the logits; False: the class does not exist, say in a vocabulary that is padded to
        a multiple of 128, or for an action that a state forbids. An integer label on such a class has loss inf; a row
        without any class counts as weight 0.
      weights: bool, integer or float, broadcast to the batch shape: say the mask of a chat template, an advantage, or
        the learned weights of examples. A row of weight 0 contributes exactly 0 to loss and gradients, whatever it
        holds; the derivative by that weight is its loss, or 0 where that is not finite.
      ignore_index: rows with this integer label get weight 0; in range or not. Say -100, with which Hugging Face pads.
      class_weights: c, `[classes]`, say the inverse frequency of rare classes. A class weight of 0 wins over an
        infinite loss.
      label_smoothing: ε in [0, 1], spread over all K classes, say 0.1 against overconfident classifiers. Those who
        spread ε over the K-1 others (Flax's examples, T5X, big_vision) have label_smoothing = ε · K/(K-1) here.
      z_loss: factor of log_normalizer², not class-weighted: say 1e-4, which keeps the logits of a bfloat16 run from
        drifting. The mean divides it as all else, by Σ weights · c_y (Liger divides it by the token count: add that as
        a loss of its own, with no class weights).
      logit_scale: inverse temperature, say the learned one of a contrastive loss.
      softcap: bound of the logits, > 0, say 30 as in Gemma 2. It makes -inf the finite -softcap; use `where` to remove
        a class.
      reduction: "mean", "sum", or "none" for a loss of each token, say to sort examples by it.
      normalizer: replaces the mean's divisor, say by the token count of all accumulation steps or devices; 0 gives 0.
      axis_name: inside `jax.shard_map`, the mesh axis or axes that the classes are sharded over. `logits`, dense
        labels, `where` and `class_weights` are then this device's part of the classes (`where` may pad them to even
        parts), integer labels ids among all of them; the loss is that of the whole, the same on all these devices.
        Gradients need check_vma=True, the default. Under plain `jit` sharded arrays need no `axis_name`. Leave it out
        where the tokens are sharded: each device's would count as further classes of the same tokens, a wrong number
        that no type tells. To see it, look at the loss of `0 * logits`: it must be the log of the number of classes.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize` of the loss: the same values, and the gradient
        at the same price. Without it JAX says that a `custom_vjp` has no forward mode. `jax.hessian` and products with
        it, forward over reverse, need no flag.
      statistics: True returns (loss, `LabelStatistics`): what `label_statistics` says of every token, without a
        gradient, on a GPU from the same pass; for `jax.value_and_grad(..., has_aux=True)`. Only what is used is
        computed. Of integer labels; 0 where the weight is. With `weights` w, a step's accuracy is Σ w · correct / Σ w,
        its z-loss z_loss · Σ w · log_normalizer² / Σ w, and its perplexity exp of -Σ w · log_prob / Σ w; beside
        `ignore_index` w is `labels != ignore_index`.

    Every float option may be a traced scalar, and has a gradient; `weights`, `class_weights` and dense labels too.
    Of traced options, a value out of range gives NaN.

    Returns:
      A scalar, or the batch shape for `reduction="none"`; a pair with `statistics=True`.

    Raises:
      TypeError, ValueError: while tracing, for shapes, dtypes and numbers that do not fit; the message says which.

    >>> import jax, jax.numpy as jnp
    >>> from softmax_jax import cross_entropy
    >>> logits = jnp.array([[2.0, 1.0, 0.0], [0.0, 30.0, 0.0]])
    >>> labels = jnp.array([0, 1])
    >>> [f"{loss:.5e}" for loss in cross_entropy(logits, labels, reduction="none")]
    ['4.07606e-01', '1.87152e-13']
    >>> jax.grad(cross_entropy)(logits, labels).shape
    (2, 3)

    Prieto et al., "Grokking at the Edge of Numerical Stability", ICLR 2025, arXiv:2501.04697, on why it matters;
    Szegedy et al., CVPR 2016, arXiv:1512.00567 (label smoothing); Chowdhery et al., "PaLM", 2022, arXiv:2204.02311
    (z-loss); Gemma Team, "Gemma 2", 2024, arXiv:2408.00118 (softcap).
    """
    source = given_logits("logits", logits, labels)
    options = Options(where, weights, ignore_index, class_weights, label_smoothing, z_loss, logit_scale, softcap)
    settings = Settings(reduction, normalizer, axis_name, forward_mode=forward_mode)
    return _loss(source, labels, options, settings, class_axis("logits", source.shape, axis), statistics)


@overload
def linear_cross_entropy(
    x: Floats, weight: Floats, labels: AnyLabels, *, statistics: Literal[False] = False, **options: Unpack[HeadOptions]
) -> Loss: ...
@overload
def linear_cross_entropy(
    x: Floats, weight: Floats, labels: AnyLabels, *, statistics: Literal[True], **options: Unpack[HeadOptions]
) -> LossAndStatistics: ...


@hinted
def linear_cross_entropy(
    x: Float[ArrayLike, "*batch embed"] | Nested,
    weight: Float[ArrayLike, "_ _"] | Nested,
    labels: AnyLabels,
    *,
    bias: Float[ArrayLike, " classes"] | Nested | None = None,
    transpose_weight: bool = False,
    where: Mask | None = None,
    weights: AnyArray | None = None,
    ignore_index: int | None = None,
    class_weights: Num[ArrayLike, " classes"] | Nested | None = None,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    logit_scale: Scalar = 1.0,
    softcap: Scalar | None = None,
    reduction: Reduction = "mean",
    normalizer: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    dtype: DTypeLike | None = None,
    chunk_size: int | None = None,
    forward_mode: bool = False,
    statistics: bool = False,
) -> Loss | LossAndStatistics:
    """`cross_entropy(x @ weight + bias, labels, ...)` without ever holding the logits.

    Tokens go through in chunks: one matrix product makes a chunk's logits in float32, the very functions of
    `cross_entropy` make its loss and, in the same pass, the gradient of its logits, and the logits are dropped. That
    gradient is kept, in the dtype that is multiplied, of as many tokens as it takes to make the two other products
    efficient: three in all, as the plain form has. Temporary memory beyond operands and gradients, bytes a class:

        4 · chunk_size  +  2 · kept  +  4 · embed, where tokens > kept, unless `weight` is float32       bfloat16
        4 · chunk_size  +  4 · chunk_size                                                                float32

    with kept at most max(4096, chunk_size), or all tokens as long as that takes no more (float16: the second line, and
    4 · embed), and a float32 copy of the gradient of `x` where tokens > kept.

    Args:
      x: hidden states, `[*batch, embed]`.
      weight: `[embed, classes]`, or `[classes, embed]` with `transpose_weight=True` (tied embeddings; not copied).
      labels: integer class ids of the batch shape, or probabilities `[*batch, classes]`, or `SparseLabels`.
      bias: `[classes]`, added to the logits.
      where: bool, broadcastable to `[*batch, classes]`. A column of `weight` that it hides is multiplied all the same:
        it may hold any number, but a NaN there makes the gradient of `x` NaN.
      axis_name: inside `jax.shard_map`, the mesh axis or axes that the classes are sharded over: `weight`, `bias`,
        dense labels, `where` and `class_weights` are this device's part of the classes; `x` and integer labels are the
        same along them (if each device has other tokens there, `jax.lax.all_gather` them first).
      dtype: what both are multiplied in, by default their promotion: a bfloat16 `x` with a float32 `weight`, as Flax
        has them with `dtype=jnp.bfloat16`, multiplies in float32 unless told `dtype=jnp.bfloat16` here too. Logits and
        sums are float32 (float64 of float64), and each gradient has its operand's dtype, whatever this is.
      chunk_size: the most tokens whose logits exist at a time: of one device's under `shard_map` and in explicit
        sharding, of all in automatic sharding. By default the largest of three numbers: the tokens whose float32
        logits take 32 MiB; embed / 2; and embed, but 512 at most (1024 of 4096 tokens or more). Chunks are of equal
        size; where no such size divides the number of tokens, the per-token operands are copied once, padded with
        tokens of weight 0. Strided: chunk c holds tokens c, c + count, c + 2 count, ...

    The other arguments, their edge behaviour, the reductions and what is raised are those of `cross_entropy`; in
    `forward_mode` a backward pass makes each chunk's logits again, of float32 copies of the operands. A row
    of weight 0 contributes exactly 0 also to the gradient of `weight`, whatever its `x` holds. Gradients flow to `x`,
    `weight`, `bias`, `weights`, `class_weights`, the float options and dense labels. Under `jit` one that is not used
    is dead code (a frozen head costs two matrix products, not three); outside of it all are computed. Over devices
    that share it, the head's gradient is summed once, after the loops, in float32.

    Where the head is in a module: `nnx.Linear.kernel` and Linen's `params["kernel"]` are `[embed, classes]`;
    `nnx.Embed.embedding` and `eqx.nn.Linear.weight` are `[classes, embed]`, for `transpose_weight=True`. A head that is
    a function: `sum_over_chunks`.

    Returns:
      A scalar, or the batch shape for `reduction="none"`, whose backward pass makes each chunk's logits again; a pair
      with `statistics=True`, which takes no further product.

    >>> import jax, jax.numpy as jnp
    >>> from softmax_jax import linear_cross_entropy
    >>> x, weight = jnp.eye(3, 4), jnp.arange(20.0).reshape(4, 5)
    >>> labels = jnp.array([0, 4, 2])
    >>> print(f"{linear_cross_entropy(x, weight, labels):.5f}")
    2.45191
    >>> dx, dweight = jax.grad(linear_cross_entropy, argnums=(0, 1))(x, weight, labels)

    Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", ICLR 2025, arXiv:2411.09009; Hsu et al.,
    "Liger Kernel", 2024, arXiv:2410.10989.
    """
    source = head(x, weight, bias, transpose_weight, dtype)
    options = Options(where, weights, ignore_index, class_weights, label_smoothing, z_loss, logit_scale, softcap)
    settings = Settings(reduction, normalizer, axis_name, chunk_size, forward_mode)
    return _loss(source, labels, options, settings, len(source.shape) - 1, statistics)


def _loss(
    source: Source, labels: AnyLabels, options: Options, settings: Settings, axis: int, statistics: bool
) -> Loss | LossAndStatistics:
    operands = source, labels, options, settings, axis
    if statistics:
        return compute_of_labels(losses_and_statistics, *operands, only_ids=" with statistics=True")
    return compute_of_labels(weighted_losses, *operands)[0]
