"""What README.md and the page for those who come from Optax say beside their code: the length of the former, the calls
before and after, the five differences from Optax, where float32 ends."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import softmax_jax

ROOT = Path(__file__).parents[2]
README, MIGRATION = (ROOT / "README.md").read_text(), (ROOT / "docs/guides/migration.md").read_text()
BEFORE, AFTER = r"^\| `([^`]+)` \|", r" `((?:linear_)?cross_entropy\([^`]+)` \|$"


@pytest.fixture(autouse=True)
def as_readers_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_readme_is_short():
    """Of its words, those beside code: the command in CONTRIBUTING.md counts them alike, marks of tables too."""
    beside_fences = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in beside_fences.splitlines() if not line.startswith(("    ", "<!--"))]
    assert len(README.splitlines()) <= 200
    assert len(" ".join(lines).split()) <= 1500


def test_readme_shows_no_pictures():
    """A package index would not show them: the repository has no public address yet."""
    assert "![" not in README


@pytest.mark.thorough
def test_before_and_after_are_the_same(rng):
    page = MIGRATION[MIGRATION.index("| before | after |") : MIGRATION.index("All of them:")]
    rows = re.findall(BEFORE + AFTER, page, re.MULTILINE)
    assert len(rows) == 4
    x, head = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 3), (3, 5)))
    z, y = x @ head, jnp.array([0, 4, 2, 2, 1, 3])
    for before, after in rows:
        labels = y.at[2:4].set(-100) if "-100" in before else y
        names = {**vars(softmax_jax), "jnp": jnp, "optax": optax, "x": x, "head": head, "z": z, "y": labels}
        names |= {"t": jax.nn.one_hot(y, 5)}
        names["loss"] = optax.softmax_cross_entropy_with_integer_labels(z, y)
        np.testing.assert_allclose(eval(after, names), eval(before, names), rtol=1e-5, err_msg=before)


@pytest.mark.thorough
@pytest.mark.nan
def test_the_five_differences_from_optax():
    theirs, ours = (of.softmax_cross_entropy_with_integer_labels for of in (optax, softmax_jax))
    z, first = jnp.array([[3.0, 2.0, 0.5]]), jnp.array([0])

    np.testing.assert_allclose(theirs(z, jnp.array([-1])), theirs(z, jnp.array([2])))
    assert jnp.isnan(ours(z, jnp.array([-1])))

    hidden = {"where": jnp.array([[False, True, True]])}
    assert -jnp.inf < theirs(z, first, **hidden)[0] < 0
    assert ours(z, first, **hidden) == jnp.inf

    absent, label = z.at[0, 2].set(-jnp.inf), jax.nn.one_hot(first, 3)
    assert jnp.isnan(optax.softmax_cross_entropy(absent, label))
    assert softmax_jax.softmax_cross_entropy(absent, label)[0] > 0

    assert theirs(z.astype(jnp.bfloat16), first).dtype == jnp.bfloat16
    assert ours(z.astype(jnp.bfloat16), first).dtype == jnp.float32

    assert optax.softmax_cross_entropy(z, label[0]).shape == (1,)
    with pytest.raises(ValueError, match="of the logits' shape"):
        softmax_jax.softmax_cross_entropy(z, label[0])
    for name in ("safe_softmax_cross_entropy", "poly_loss_cross_entropy"):
        assert getattr(softmax_jax, name)(z, label[0]).shape == (1,)


@pytest.mark.optimized
@pytest.mark.parametrize(("classes", "margin"), [(2, 87), (1000, 80), (128256, 75)])
def test_where_float32_ends(classes, margin):
    """At the margin that is named the loss is there, right to the rounding of a sum of so many equal terms, which some
    compilers add one after the other; two nats beyond it is 0."""
    for beyond in (0, 2):
        z = np.zeros((1, classes), np.float32)
        z[0, 0] = margin + beyond + np.log(classes - 1)
        loss = softmax_jax.cross_entropy(z, np.zeros(1, np.int32))
        want = 0 if beyond else (classes - 1) * np.exp(-np.float64(z[0, 0]))
        np.testing.assert_allclose(loss, want, rtol=1e-6 + classes * np.finfo(np.float32).eps / 2)
