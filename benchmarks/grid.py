"""The sizes that are measured, and those of `--quick`."""

DTYPES = ("float32", "bfloat16", "float16")

LOGITS = ((262144, 10), (65536, 1000), (16384, 8192), (4096, 32000), (1024, 128256), (256, 262144))
LOGITS_GPU = ((65536, 1000), (8192, 32000), (8192, 128256))
DTYPES_GPU = ("float32", "bfloat16")
"""Tokens x classes, and their formats."""

LINEAR = ((2048, 512, 32000), (1024, 1024, 128256), (8192, 256, 8192))
LINEAR_GPU = (*((8192, embed, 50304) for embed in (1024, 2048)), *((n, 4096, 128256) for n in (4096, 8192, 16384)))
"""Tokens x embed x classes."""

STEP = (((2048,), 256, 32000), ((8, 256), 256, 8192), ((16384,), 256, 1000))
STEP_GPU = (((8192,), 1024, 128256),)
"""Batch shape, embed, classes."""

GROWTH = {
    "cross_entropy, tokens": tuple((tokens, 0, 1000) for tokens in (64, 256, 1024, 4096, 16384, 65536)),
    "cross_entropy, classes": tuple((256, 0, classes) for classes in (256, 1024, 4096, 16384, 65536, 262144)),
    "linear_cross_entropy, tokens": tuple((tokens, 64, 4096) for tokens in (32, 128, 512, 2048, 8192, 32768)),
    "linear_cross_entropy, classes": tuple((1024, 64, classes) for classes in (256, 1024, 4096, 16384, 65536, 262144)),
}
"""Three decades of one size, the others as they are."""

MARGINS = tuple(range(0, 101, 5))

QUICK_DTYPES = ("float32", "bfloat16")
QUICK_LOGITS = ((16, 100),)
QUICK_LINEAR = ((64, 8, 100),)
QUICK_STEP = (((64,), 8, 100), ((8, 8), 8, 100))
QUICK_GROWTH = {
    "cross_entropy, tokens": ((4, 0, 10), (16, 0, 10), (64, 0, 10)),
    "linear_cross_entropy, classes": ((8, 4, 10), (8, 4, 100), (8, 4, 1000)),
}
QUICK_MARGINS = (0, 20)
