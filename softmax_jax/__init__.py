"""Softmax and cross-entropy for JAX: exact, small, fast.

The table of contents, in reading order: the functions. The idea is in four files behind them: `_token_loss` (from sums
to a loss), `_waist` (which sums), `_class_sums` (the `custom_vjp`: why the gradient is (p - t)/N), `_blocks` (the sums
as they are written, on the CPU). On GPUs and TPUs `_combine` joins two sets of classes.
"""

# ruff: noqa: I001
from softmax_jax._softmax import softmax as softmax
from softmax_jax._softmax import log_softmax as log_softmax
from softmax_jax._cross_entropy import cross_entropy as cross_entropy
from softmax_jax._cross_entropy import linear_cross_entropy as linear_cross_entropy
from softmax_jax._token_statistics import LabelStatistics as LabelStatistics
from softmax_jax._label_statistics import label_statistics as label_statistics
from softmax_jax._label_statistics import linear_label_statistics as linear_label_statistics
from softmax_jax._kl_divergence import kl_divergence as kl_divergence
from softmax_jax._kl_divergence import linear_kl_divergence as linear_kl_divergence
from softmax_jax._sparse_labels import SparseLabels as SparseLabels
from softmax_jax._sum_over_chunks import sum_over_chunks as sum_over_chunks
from softmax_jax._optax_names import softmax_cross_entropy as softmax_cross_entropy
from softmax_jax._optax_names import (
    softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,
)
from softmax_jax._optax_names import safe_softmax_cross_entropy as safe_softmax_cross_entropy
from softmax_jax._optax_names import poly_loss_cross_entropy as poly_loss_cross_entropy

__version__ = "0.2.0"
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
