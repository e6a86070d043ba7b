"""The error of a call with an argument that a function does not have: it says which one was meant."""

import difflib
import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# What PyTorch, Optax, Keras, Liger and tokamax call it: {here: what to know}, of which a function is told the first
# that it has.
ELSEWHERE: dict[str, dict[str, str]] = {
    "weight": {"class_weights": "one number a class; `weights` are one a token", "weights": "one number a token"},
    "ce_weight": {"class_weights": "one number a class"},
    "sample_weight": {"weights": "one number a token"},
    "mask": {"weights": "which tokens count; `where` says which classes exist", "where": ""},
    "dim": {"axis": ""},
    "input": {"logits": "", "x": ""},
    "inputs": {"logits": "", "x": ""},
    "_input": {"x": ""},
    "student_input": {"x": ""},
    "teacher_input": {"teacher_x": ""},
    "y_pred": {"logits": ""},
    "log_predictions": {"logits": "log-probabilities are logits too"},
    "student_logits": {"logits": ""},
    "target": {"labels": "class ids or probabilities", "teacher_probs": ""},
    "targets": {"labels": "class ids or probabilities", "teacher_probs": ""},
    "y_true": {"labels": "class ids or probabilities", "teacher_probs": ""},
    "log_target": {"teacher_logits": "log-probabilities are logits too"},
    "log_targets": {"teacher_logits": "log-probabilities are logits too"},
    "kernel": {"weight": "[embed, classes]"},
    "linear_weight": {"weight": "with transpose_weight=True for [classes, embed]"},
    "lin_weight": {"weight": "with transpose_weight=True for [classes, embed]"},
    "student_weight": {"weight": "with transpose_weight=True for [classes, embed]"},
    "linear_bias": {"bias": ""},
    "temperature": {"logit_scale": "1 / temperature", "logits": "logits / temperature", "x": "x / temperature"},
    "size_average": {"reduction": "'mean', 'sum' or 'none'"},
    "reduce": {"reduction": "'mean', 'sum' or 'none'"},
    "alpha": {"label_smoothing": ""},
    "pad_token_id": {"ignore_index": ""},
    "lse_square_scale": {"z_loss": ""},
    "logsumexp_weight": {"z_loss": ""},
    "return_z_loss": {"statistics": "True returns the log-normalizers beside the loss"},
    "return_token_accuracy": {"statistics": "True returns what is correct beside the loss"},
    "return_predicted_tokens": {"statistics": "True returns the predictions beside the loss"},
    "logit_soft_cap": {"softcap": ""},
    "logit_softcapping": {"softcap": ""},
    "jsd_beta": {"beta": ""},
    "accum_dtype": {"dtype": "of the product; sums are float32 by themselves"},
    "num_chunks": {"chunk_size": "the most tokens a chunk may have"},
}


def hinted(function: Callable[P, R]) -> Callable[P, R]:
    """`function`; an argument that it does not have is a TypeError that names the one that was meant."""
    names = list(inspect.signature(function).parameters)
    known = frozenset(names)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if known.issuperset(kwargs):
            return function(*args, **kwargs)
        unknown = [name for name in kwargs if name not in known]
        raise TypeError("\n".join(_hint(function.__name__, name, names) for name in unknown))

    return call


def _hint(function: str, name: str, names: list[str]) -> str:
    meant = {here: note for here, note in ELSEWHERE.get(name, {}).items() if here in names}
    meant = meant or dict.fromkeys(difflib.get_close_matches(name, names, 1, 0.7), "")
    error = f"{function}() got an unexpected keyword argument '{name}'. "
    if not meant:
        return f"{error}Its arguments are {', '.join(f'`{here}`' for here in names)}."
    here, note = next(iter(meant.items()))
    return f"{error}Did you mean `{here}`{f' ({note})' if note else ''}?"
