"""Logits that are the product of hidden states with a head, and never held: tokens go through in chunks.

In reading order:

    product    where logits come from: they are given, or a product with a head; its two gradients
    chunks     sums and maps over chunks, whose gradients are taken chunk by chunk
    deal       how tokens are dealt out to chunks
"""
