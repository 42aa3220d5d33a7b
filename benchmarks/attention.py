"""Attention of a packed row, forward and backward: its cost is the sum over documents (1 x 1024 against 8 x 128).

python benchmarks/attention.py
"""

import torch
from common import best, finish

from diptych.core.batch import pack
from diptych.core.layout import Kind, Layout, Segment
from diptych.parts.attention import Dense, Packed


def row(documents: int, length: int):
    """A packed row of documents, each half causal text and half one fully attending block."""
    half = length // 2
    one = (Segment(Kind.TEXT, (1,) * half), Segment(Kind.CLEAN, (1,) * (length - half), full=True))
    return pack([Layout(str(i), one) for i in range(documents)])


if __name__ == "__main__":
    rows = []
    for documents, length in ((1, 1024), (2, 512), (4, 256), (8, 128), (32, 32)):
        batch = row(documents, length)
        q, k, v = (torch.randn(documents * length, h, 64, requires_grad=True) for h in (8, 2, 2))
        seconds = {}
        for name, backend in (("packed", Packed(batch)), ("dense", Dense(batch))):
            seconds[name] = best(lambda b=backend, qkv=(q, k, v): b(0, *qkv).sum().backward())
        times = {f"{name} ms": s * 1e3 for name, s in seconds.items()}
        rows.append({"documents": documents, "length": length, **times})
    finish("attention", rows, packed_1x1024_over_8x128=rows[0]["packed ms"] / rows[3]["packed ms"])
