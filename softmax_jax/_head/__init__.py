"""Logits that are the product of hidden states with a head, and never held: tokens go through in chunks.

product    the product and its two gradients
chunks     sums and maps over chunks, whose gradients are taken chunk by chunk
deal       how tokens are dealt out to chunks
"""
