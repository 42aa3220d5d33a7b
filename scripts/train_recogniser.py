"""Trains the judge of GenEval-emoji (``diptych.evaluation.judges.recogniser``) and writes its weights.

python scripts/train_recogniser.py --steps 2500 --seed 0        # prints the accuracy and the CPU seconds
"""

import argparse
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from diptych.data.worlds import emoji, emoji_scenes
from diptych.evaluation.judges import recogniser
from diptych.evaluation.judges.recogniser import CLASSES, SIDE, STRIDE, Recogniser

SIZES = range(18, 41, 2)  # pixels of an emoji in training; scenes have 26 to 31


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path(recogniser.__file__).with_name("recogniser.safetensors"))
    a = p.parse_args()
    torch.manual_seed(a.seed)
    rng = np.random.default_rng(a.seed)
    stickers = _stickers()
    net = Recogniser()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, a.steps, pct_start=0.1)
    with torch.no_grad():
        net.head.bias[:-2] = -4.0  # nearly nowhere is anything
    for step in range(a.steps):
        images, heat, sizes, mask = _batch(rng, stickers, a.batch)
        out = net(images)
        loss = _focal(out[:, :-2], heat) + 5 * ((out[:, -2:] - sizes).abs() * mask).sum() / mask.sum().clamp(1) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 249:
            print(step + 1, f"loss {loss.item():.3f}", accuracy(net.eval(), 100), flush=True)
            net.train()
    save_file({k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}, a.out)
    net.eval()
    taken = {"seed": a.seed, "steps": a.steps, "cpu_seconds": round(time.process_time()), "bytes": a.out.stat().st_size}
    print(taken | accuracy(net, 1000, seed=9))


def accuracy(net: Recogniser, n: int, seed: int = 1) -> dict[str, float]:
    """The share of true scenes whose every thing is found and nothing else, clean and with noise."""
    rng = np.random.default_rng(seed)
    right = {"clean": 0, "noisy": 0}
    for _ in range(n):
        prompt = emoji_scenes.prompts(emoji_scenes.TAGS[int(rng.integers(4))], 8, int(rng.integers(1 << 30)))[0]
        image = emoji_scenes.render_scene(emoji_scenes.scene_for(rng, prompt), SIDE)
        noisy = np.clip(np.asarray(image) + rng.normal(0, 12, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
        for how, picture in (("clean", image), ("noisy", PIL.Image.fromarray(noisy))):
            right[how] += sorted(f.shape for f in net.find([picture])[0]) == sorted(prompt.ids)
    return {how: round(k / n, 4) for how, k in right.items()}


def _stickers() -> list[list[np.ndarray]]:
    """Every class at every size, (s, s, 4) in [0, 1]; the last class is two hundred other emoji."""
    every = [[emoji.find(id)] for id in CLASSES[:-1]]
    every.append([e for e in emoji.records() if e.id not in CLASSES][::7])
    return [[np.asarray(emoji.cutout(e, s), np.float32) / 255 for e in some for s in SIZES] for some in every]


def _batch(rng: np.random.Generator, stickers: list, n: int) -> tuple[torch.Tensor, ...]:
    grid = SIDE // STRIDE
    images = np.ones((n, SIDE, SIDE, 3), np.float32)
    heat = np.zeros((n, len(CLASSES), grid, grid), np.float32)
    sizes, mask = np.zeros((n, 2, grid, grid), np.float32), np.zeros((n, 1, grid, grid), np.float32)
    cells = np.arange(grid) + 0.5
    for i in range(n):
        taken: list[tuple[int, int, int]] = []
        same = int(rng.integers(len(CLASSES) - 1)) if rng.random() < 0.3 else None
        for _ in range(int(rng.integers(0, 6))):
            kind = same if same is not None else int(rng.integers(len(CLASSES)))
            sticker = stickers[kind][int(rng.integers(len(stickers[kind])))]
            s = sticker.shape[0]
            x, y = (int(v) for v in rng.integers(0, SIDE - s + 1, 2))
            if any(
                abs(x + s / 2 - cx) < (s + cs) * 0.45 and abs(y + s / 2 - cy) < (s + cs) * 0.45 for cx, cy, cs in taken
            ):
                continue
            alpha = sticker[..., 3:]
            patch = images[i, y : y + s, x : x + s]
            patch[:] = patch * (1 - alpha) + sticker[..., :3] * alpha
            rows, columns = np.nonzero(alpha[..., 0] > 0.5)
            if not len(rows):
                continue
            w, h = np.ptp(columns) + 1, np.ptp(rows) + 1
            cx, cy = x + columns.min() + w / 2, y + rows.min() + h / 2
            taken.append((x + s / 2, y + s / 2, s))
            spread = 0.12 * s / STRIDE + 0.3
            blob = np.exp(-((cells - cx / STRIDE) ** 2 + (cells[:, None] - cy / STRIDE) ** 2) / (2 * spread**2))
            row, column = min(int(cy / STRIDE), grid - 1), min(int(cx / STRIDE), grid - 1)
            blob[row, column] = 1
            heat[i, kind] = np.maximum(heat[i, kind], blob)
            sizes[i, :, row, column] = w / SIDE, h / SIDE
            mask[i, 0, row, column] = 1
    images += rng.standard_normal(images.shape, np.float32) * rng.uniform(0, 0.08, (n, 1, 1, 1)).astype(np.float32)
    tint = rng.uniform((0.9, -0.05), (1.1, 0.05), (n, 1, 1, 3, 2)).astype(np.float32)
    images = images * tint[..., 0] + tint[..., 1]
    x = torch.from_numpy(np.clip(images, 0, 1)).permute(0, 3, 1, 2)
    soft = torch.from_numpy(rng.random(n).astype(np.float32) < 0.3)[:, None, None, None]
    x = torch.where(soft, F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1), x)
    return x, torch.from_numpy(heat), torch.from_numpy(sizes), torch.from_numpy(mask)


def _focal(logits: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """The penalty-reduced focal loss of centre points."""
    p, hit = logits.sigmoid().clamp(1e-4, 1 - 1e-4), heat == 1
    gain = torch.where(hit, (1 - p) ** 2 * p.log(), (1 - heat) ** 4 * p**2 * (1 - p).log())
    return -gain.sum() / hit.sum().clamp(1)


if __name__ == "__main__":
    main()
