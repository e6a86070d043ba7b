"""Bytes per device and bytes moved per step of a sharded `linear_cross_entropy`, as formulas: docs/scaling.md.

`test_scaling.py` holds them against compiled programs, and the table of the page against them.
"""

from typing import NamedTuple

KEPT_TOKENS = 4096
"""At most so many tokens of 16-bit operands have the gradient of their logits kept at a time, unless all are cheap."""


class Step(NamedTuple):
    """One forward and backward pass of a mean loss over `data` x `model` devices, by `axis_name` or explicit layout."""

    tokens: int  # of all devices
    embed: int
    classes: int  # of all devices
    data: int
    model: int
    chunk: int  # tokens of a chunk on a device
    itemsize: int = 2  # bytes of a number of x and weight; sums are float32

    @property
    def local_tokens(self) -> int:
        return self.tokens // self.data

    @property
    def local_classes(self) -> int:
        return self.classes // self.model

    def chunk_bytes(self) -> int:
        """A chunk's logits in float32."""
        return 4 * self.chunk * self.local_classes

    def kept_tokens(self) -> int:
        """Those of a super-chunk: all, while what is kept of them is no more than the head's float32 gradient and what
        would be kept beside it."""
        tokens, most = self.local_tokens, max(self.chunk, KEPT_TOKENS) if self.itemsize == 2 else self.chunk
        head_sum = 4 * self.embed if self.itemsize == 2 else 0
        return tokens if self.itemsize * tokens <= head_sum + self.itemsize * most else -(-tokens // -(-tokens // most))

    def kept_bytes(self) -> int:
        """The gradient of a super-chunk's logits."""
        return self.itemsize * self.kept_tokens() * self.local_classes

    def sums_bytes(self) -> int:
        """The gradients of x and weight in float32, before their one cast."""
        return 4 * self.embed * (self.local_classes + self.local_tokens)

    def per_token_moved(self) -> int:
        """All-reduced over `model` in both passes: the maximum, then `rest` and `own`. The backward pass moves none."""
        return 3 * 4 * self.local_tokens if self.model > 1 else 0

    def dx_moved(self) -> int:
        """All-reduced over `model`."""
        return 4 * self.local_tokens * self.embed if self.model > 1 else 0

    def dweight_moved(self) -> int:
        """All-reduced over `data`, once a step."""
        return 4 * self.embed * self.local_classes if self.data > 1 else 0

    def gathered_logits_bytes(self) -> int:
        """What a device holds at least where the logits are gathered: all classes of its tokens."""
        return self.itemsize * self.local_tokens * self.classes

    def gathered_logits_moved(self) -> int:
        """What a device receives for them."""
        return self.gathered_logits_bytes() * (self.model - 1) // self.model


def ring(payload: int, devices: int) -> float:
    """Bytes that each device sends for an all-reduce of `payload` bytes: a ring's, the least there is."""
    return 2 * payload * (devices - 1) / devices


def table() -> list[list[str]]:
    """8192 tokens for every row of 8 devices that share a vocabulary, embed 4096, bfloat16, chunks of 32 MiB."""
    rows = []
    for data in (1, 8, 128):
        for classes in (131072, 262144, 1048576):
            step = Step(8192 * data, 4096, classes, data, model=8, chunk=2**25 // (4 * classes // 8))
            held = step.gathered_logits_bytes(), step.gathered_logits_moved(), step.chunk_bytes()
            held += step.kept_bytes(), step.sums_bytes()
            sent = ring(step.dx_moved(), 8), ring(step.dweight_moved(), data)
            rows.append(
                [
                    str(8 * data),
                    f"{data} x 8",
                    f"{classes:,}",
                    *(f"{number / 2**20:,.0f} MiB" for number in held),
                    f"{ring(step.per_token_moved(), 8) / 2**20:.2f} MiB",
                    *(f"{number / 2**20:,.0f} MiB" for number in sent),
                ]
            )
    return rows
