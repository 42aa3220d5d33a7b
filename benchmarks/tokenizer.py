"""Reconstruction by a picture tokenizer: PSNR by data set, codebook usage, and the share of true scenes that still pass
the strict judge.

python benchmarks/tokenizer.py [AUTOENCODER]
"""

import sys

import numpy as np
import torch
from common import finish

from diptych.core.tensors import to_float
from diptych.data.worlds import embedded, shapes, shapes_judge
from diptych.models import store
from diptych.parts.images import to_pil, to_tensor

SETS = ("shapes/draw", "emoji64/draw", "emoji/draw", "emoji/scenes")
PICTURES, PROMPTS = 128, 24


def through(autoencoder, images: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(pictures, what was kept, pictures again), in [-1, 1]."""
    x = to_float(torch.stack([to_tensor(i, i.size) for i in images]))
    kept = [autoencoder.encode(some) for some in x.split(16)]
    return x, torch.cat(kept), torch.cat([autoencoder.decode(k).clamp(-1, 1) for k in kept])


@torch.inference_mode()
def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "autoencoder/vq-tiny"
    model = store.load(name)
    autoencoder, codebook = model.autoencoder, model.config.autoencoder.codebook
    rows, seen = [], []
    for data in SETS:
        source = embedded.source(data, "test")
        x, codes, again = through(autoencoder, [next(source[i].images()).pixels for i in range(PICTURES)])
        psnr = 10 * torch.log10(4 / (x - again).square().mean((1, 2, 3)))
        rows.append({"data": data, "PSNR dB": float(psnr.mean()), "worst dB": float(psnr.min())})
        if codebook:
            seen.append(codes.flatten())
            share = torch.bincount(seen[-1], minlength=codebook).double() / len(seen[-1])
            rows[-1] |= {"codes used": int((share > 0).sum()), "perplexity": _perplexity(share)}
    right, total = 0, 0
    for tag in shapes.TAGS:
        rng = np.random.default_rng(0)
        prompts = shapes.prompts(tag, PROMPTS, 0, False)
        scenes = [shapes.render(shapes.scene_for(rng, p), 64) for p in prompts]
        again = through(autoencoder, scenes)[2]
        right += sum(shapes_judge.check(to_pil(a), p).ok for a, p in zip(again, prompts, strict=True))
        total += len(prompts)
    summary = {"strict judge passes": right / total, "scenes": total}
    if codebook:
        share = torch.bincount(torch.cat(seen), minlength=codebook).double() / sum(map(len, seen))
        summary |= {"codebook": codebook, "codes used": int((share > 0).sum()), "perplexity": _perplexity(share)}
    finish(f"tokenizer {name}", rows, **summary)


def _perplexity(share: torch.Tensor) -> float:
    return float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()))


if __name__ == "__main__":
    main()
