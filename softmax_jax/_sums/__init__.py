"""The idea: every loss is a function of a few sums over the classes of one token, in which nothing cancels.

    waist      which sums, and how they are written; the types that these files exchange
    targets    from labels to what each class is compared with
    combine    joins the sums of two sets of classes
    blocks     the sums in blocks of tokens that stay in the cache (CPU)
    fold       the same in one pass over the logits (GPU, TPU)
    rule       the `custom_vjp` and, inside of it, the forward mode
    loss       from the sums to a loss

The terms:

    token      what has one loss: one row of logits, one label
    classes    what a softmax runs over; on one axis, which may be sharded over devices
    m          row_max, the largest logit of a token, a constant
    pivot      the class that is left out of a token's sums: its label, or the class of the largest logit
    rest       Σ exp(z_v - m) over all classes but the pivot
    own        z - m of the pivot
    target     t_v, what a class is compared with: the label's probability, times its class weight
    even       what is spread evenly over all classes that exist: label smoothing, `SparseLabels.others`
    block      tokens whose logits stay in the cache of a CPU
    chunk      tokens whose logits exist at a time, where a head makes them
"""
