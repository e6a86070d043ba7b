"""The error of a call with an argument that a function does not have, or not by position: it says which was meant."""

import difflib
import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# What PyTorch, Optax, Keras, Liger and tokamax call it: {here: what to know}, of which a function is told the first
# that it has; nothing, where what is near by its letters is something else.
ELSEWHERE: dict[str, dict[str, str]] = {
    "weight": {"class_weights": "one number a class; `weights` are one a token", "weights": "one number a token"},
    "ce_weight": {"class_weights": "one number a class"},
    "sample_weight": {"weights": "one number a token"},
    "mask": {"weights": "which tokens count; `where` says which classes exist", "where": "which classes exist"},
    "weights": {},
    "ignore_index": {"weights": "0 for tokens that do not count"},
    "logit_scale": {"temperature": "1 / logit_scale"},
    "dim": {"axis": ""},
    "input": {"logits": "", "x": ""},
    "inputs": {"logits": "", "x": ""},
    "_input": {"x": ""},
    "student_input": {"x": ""},
    "teacher_input": {"teacher_x": ""},
    "y_pred": {"logits": ""},
    "log_predictions": {"logits": "log-probabilities are logits too"},
    "student_logits": {"logits": ""},
    "teacher": {"teacher_logits": "of probabilities it is `teacher_probs`"},
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
    parameters = inspect.signature(function).parameters
    names = list(parameters)
    known = frozenset(names)
    by_position = [name for name, of in parameters.items() if of.kind != inspect.Parameter.KEYWORD_ONLY]

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > len(by_position):
            raise TypeError(_by_keyword(function.__name__, len(args), by_position, names))
        given = by_position[: len(args)]
        if known.issuperset(kwargs) and kwargs.keys().isdisjoint(given):
            return function(*args, **kwargs)
        wrong = [name for name in kwargs if name not in known or name in given]
        raise TypeError("\n".join(_hint(function.__name__, name, names, name in given) for name in wrong))

    return call


def _by_keyword(function: str, given: int, by_position: list[str], names: list[str]) -> str:
    teachers = [name for name in names if name in ("teacher_logits", "teacher_probs")]
    likely = teachers or [name for name in names if name in ("weights", "where", "bias")]
    meant = f", such as {' or '.join(f'`{name}=`' for name in likely)}" if likely else ""
    first = ", ".join(f"`{name}`" for name in by_position)
    return f"{function}() takes {first} by position; got {given} arguments. Pass the others by keyword{meant}."


def _hint(function: str, name: str, names: list[str], twice: bool) -> str:
    """Of a name that the function does not have, or that is given `twice`, by position and by keyword."""
    others = [here for here in names if here != name]
    meant = {here: note for here, note in ELSEWHERE.get(name, {}).items() if here in others}
    if not twice and name not in ELSEWHERE:
        meant = dict.fromkeys(difflib.get_close_matches(name, others, 1, 0.7), "")
    error = f"{function}() got {'multiple values for' if twice else 'an unexpected keyword'} argument '{name}'."
    if not meant:
        way_out = "Pass one of them." if twice else f"Its arguments are {', '.join(f'`{here}`' for here in names)}."
        return f"{error} {way_out}"
    here, note = next(iter(meant.items()))
    return f"{error} Did you mean `{here}`{f' ({note})' if note else ''}?"
