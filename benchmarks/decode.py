"""Greedy decoding against ``transformers.generate`` on the same Qwen2 weights (width 256, 6 layers, batch 1, float32).

python benchmarks/decode.py
"""

from contextlib import nullcontext
from statistics import median

import torch
from common import best, finish
from transformers import Qwen2Config, Qwen2ForCausalLM

from diptych.core.batch import pack
from diptych.core.layout import Kind, Layout, Segment
from diptych.models.protocol import Context
from diptych.models.published import key_map, parts
from diptych.parts.attention import Cache, Cached
from diptych.parts.batch_invariant import alone, steady
from diptych.parts.decoder import Decoder

PROMPT, NEW = 16, 96


def ours(decoder: Decoder, prompt: list[int]) -> list[int]:
    """Greedy ids, through the same cache and attention that families use."""
    c = decoder.config
    cache = Cache(c.num_hidden_layers, c.num_key_value_heads, c.width, torch.float32, "cpu")
    context, ids, out = Context(cache), prompt, list[int]()
    for _ in range(NEW):
        batch = pack([Layout("", (Segment(Kind.TEXT, tuple(ids)),))])
        cache = context.cache.reserve(context.length, len(ids))
        attend = Cached([cache], [context.length], batch)
        with alone() if out else nullcontext():  # as the scheduler does
            states = decoder(decoder.embed_tokens(batch.ids), batch.positions + context.position, attend)
            ids = [int(decoder.logits(states[-1]).argmax())]
        context = Context(cache, context.length + len(batch), context.position + len(batch))
        out += ids
    return out


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    theirs = Qwen2ForCausalLM(config).eval()
    decoder = Decoder(parts.decoder_config(config.to_dict())).eval()
    rules = parts.decoder_rules(config.to_dict())
    decoder.load_state_dict(key_map.load(rules, theirs.state_dict(), decoder.state_dict()))
    steady(decoder)
    prompt = torch.randint(0, 4096, (1, PROMPT))
    settings = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
    same = theirs.generate(prompt, **settings)[0, PROMPT:].tolist() == ours(decoder, prompt[0].tolist())
    works = {
        "diptych": lambda: ours(decoder, prompt[0].tolist()),
        "transformers": lambda: theirs.generate(prompt, **settings),
    }
    taken = [{name: best(work, 1, warm=not k) for name, work in works.items()} for k in range(12)]  # turn by turn
    rows = [{"who": name, "tokens/s": NEW / median(t[name] for t in taken)} for name in works]
    finish("decode", rows, same_ids=same, ratio=median(t["transformers"] / t["diptych"] for t in taken))


if __name__ == "__main__":
    main()
