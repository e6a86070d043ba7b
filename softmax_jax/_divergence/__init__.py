"""The second idea: a divergence of two softmaxes, as sums that keep their digits however close the two are.

In reading order:

    formula    which sums, of the ratio of the two
    rule       the `custom_vjp`, of the loss's own sums and of these
"""
