"""Softmax and cross-entropy for JAX: exact, small, fast.

The table of contents, in reading order: the functions. Behind them `_core` brings what came in (`_inputs`) to the
tokens, at once or in chunks whose logits a head makes (`_head`). The idea is in `_sums`: `waist` (which sums), `blocks`
(the sums on a CPU, as they are written), `rule` (the `custom_vjp`: why the gradient is (p - t)/N), `loss`.
"""

# ruff: noqa: I001
from softmax_jax._softmax import softmax as softmax
from softmax_jax._softmax import log_softmax as log_softmax
from softmax_jax._cross_entropy import cross_entropy as cross_entropy
from softmax_jax._cross_entropy import linear_cross_entropy as linear_cross_entropy
from softmax_jax._statistics import LabelStatistics as LabelStatistics
from softmax_jax._statistics import label_statistics as label_statistics
from softmax_jax._statistics import linear_label_statistics as linear_label_statistics
from softmax_jax._kl_divergence import kl_divergence as kl_divergence
from softmax_jax._kl_divergence import linear_kl_divergence as linear_kl_divergence
from softmax_jax._inputs.labels import SparseLabels as SparseLabels
from softmax_jax._sum_over_chunks import sum_over_chunks as sum_over_chunks
from softmax_jax._optax import softmax_cross_entropy as softmax_cross_entropy
from softmax_jax._optax import (
    softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,
)
from softmax_jax._optax import safe_softmax_cross_entropy as safe_softmax_cross_entropy
from softmax_jax._optax import poly_loss_cross_entropy as poly_loss_cross_entropy

__version__ = "0.3.0"
__all__ = [
    "softmax",
    "log_softmax",
    "cross_entropy",
    "linear_cross_entropy",
    "LabelStatistics",
    "label_statistics",
    "linear_label_statistics",
    "kl_divergence",
    "linear_kl_divergence",
    "SparseLabels",
    "sum_over_chunks",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "safe_softmax_cross_entropy",
    "poly_loss_cross_entropy",
]
