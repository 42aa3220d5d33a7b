"""Decoding with eight-bit weights against bfloat16: milliseconds a token and the error of the logits (one thread).

python benchmarks/int8.py
"""

from contextlib import nullcontext
from statistics import median
from time import process_time

import torch
from common import finish

from diptych.core.batch import pack
from diptych.core.layout import Kind, Layout, Segment
from diptych.models.protocol import Context
from diptych.parts.attention import Cache, Cached
from diptych.parts.batch_invariant import alone, steady
from diptych.parts.decoder import Decoder, DecoderConfig
from diptych.parts.quantize import to_int8

CONFIG = DecoderConfig(4096, 1536, 8960, 6, 12, 2)  # layers as wide as those of Qwen2.5-1.5B
PROMPT, NEW, ROUNDS = 16, 6, 5


def made(quantized: bool) -> Decoder:
    """A random bfloat16 decoder; the same weights each time."""
    torch.manual_seed(0)
    decoder = Decoder(CONFIG).eval().to(torch.bfloat16)
    if quantized:
        to_int8(decoder.layers)
    steady(decoder)
    return decoder


def decode(decoder: Decoder) -> tuple[float, torch.Tensor]:
    """(CPU seconds a token, the logits after the prompt and one more token)."""
    cache = Cache(CONFIG.num_hidden_layers, CONFIG.num_key_value_heads, CONFIG.width, torch.bfloat16, "cpu")
    context, ids, seconds, logits = Context(cache), list(range(PROMPT)), 0.0, []
    for step in range(NEW + 1):
        batch = pack([Layout("", (Segment(Kind.TEXT, tuple(ids)),))])
        cache = context.cache.reserve(context.length, len(ids))
        attend = Cached([cache], [context.length], batch)
        start = process_time()
        with alone() if step else nullcontext():  # as the scheduler does
            states = decoder(decoder.embed_tokens(batch.ids), batch.positions + context.position, attend)
            logits.append(decoder.logits(states[-1]).float())
        seconds += process_time() - start if step else 0
        ids = [step]  # the same tokens for both, so that their logits can be compared
        context = Context(cache, context.length + len(batch), context.position + len(batch))
    return seconds / NEW, logits[1]


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    arms = {"bf16": made(False), "int8": made(True)}
    taken = {name: [] for name in arms}
    logits = {}
    for _ in range(ROUNDS):  # in turns
        for name, decoder in arms.items():
            seconds, logits[name] = decode(decoder)
            taken[name].append(seconds)
    rows = [{"weights": name, "ms a token": 1e3 * median(t)} for name, t in taken.items()]
    error = (logits["int8"] - logits["bf16"]).norm() / logits["bf16"].norm()
    finish("int8", rows, ratio=median(taken["bf16"]) / median(taken["int8"]), logits_relative_error=float(error))


if __name__ == "__main__":
    main()
