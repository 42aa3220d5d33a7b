"""What evaluation costs: the harness beside bare generation, the mini suite, and GenEval's scorer.

The overhead is (harness - bare) / bare of the same drawings in the same batches, best of interleaved runs in processor
seconds; both make the benchmark's items first, all of them whatever the limit, and scoring is not in it. Without a
checkpoint GenEval's detector is of the published size with random weights, which cost the same.

python benchmarks/evaluate.py [MODEL] [DETECTOR]
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from common import finish

import diptych
from diptych.evaluation.benchmarks import geneval
from diptych.evaluation.benchmarks.table import Tools, resolve
from diptych.evaluation.harness import evaluate
from diptych.evaluation.judges import detector


def main() -> None:
    engine = diptych.load(sys.argv[1] if len(sys.argv) > 1 else "bagel/tiny", "cpu")
    rows = [overhead(engine, "geneval-dev", 4, 24), overhead(engine, "vqa-mini", 8, 16)]
    start = time.perf_counter()
    made = evaluate(engine, ["mini"], limit=4, progress=False)
    seconds = time.perf_counter() - start
    rows.append({"what": f"mini --limit 4, {len(made.outcomes)} items", "seconds": seconds, "bare": "", "share": ""})
    rows.append(scorer())
    finish("evaluate", rows)


def overhead(engine, name: str, limit: int, batch: int, repeat: int = 6) -> dict:
    """Seconds of the harness and of bare calls for the same items, and the difference's share."""
    [benchmark], _ = resolve([name], Tools())

    def chosen() -> list:
        taken: dict[str, int] = {}
        items = []
        for item in benchmark.items(0, 64):
            taken[item.category] = taken.get(item.category, 0) + 1
            items += [item] if taken[item.category] <= limit else []
        return items

    def bare() -> None:
        items = chosen()
        for at in range(0, len(items), batch):
            some = items[at : at + batch]
            if benchmark.task == "draw":
                engine.draw([i.sample for i in some], [i.seed for i in some], (64, 64), None, batch)
            else:
                engine.answers([i.sample for i in some], 48, 0.0, 0, batch)

    def harness() -> None:
        with tempfile.TemporaryDirectory() as folder:
            evaluate(engine, [name], limit=limit, folder=Path(folder), progress=False, batch_size=batch, score=False)

    best = {bare: float("inf"), harness: float("inf")}
    bare()
    for _ in range(repeat):
        for work in best:
            start = time.process_time()
            work()
            best[work] = min(best[work], time.process_time() - start)
    share = (best[harness] - best[bare]) / best[bare]
    return {
        "what": f"harness over bare, {len(chosen())} items of {name}",
        "seconds": best[harness],
        "bare": best[bare],
        "share": share,
    }


def scorer(n: int = 3) -> dict:
    """Seconds a 512 x 512 picture of GenEval's detector."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if len(sys.argv) > 2:
        find = detector.detector(sys.argv[2], device)
    else:
        swin = SwinConfig(
            embed_dim=96,
            depths=[2, 2, 18, 2],
            num_heads=[3, 6, 12, 24],
            window_size=7,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        find = detector.Detector.__new__(detector.Detector)
        find.device = torch.device(device)
        net = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, num_labels=80))
        find.net = net.to(device).eval()
    rng = np.random.default_rng(0)
    images = [PIL.Image.fromarray(rng.integers(0, 256, (512, 512, 3), np.uint8)) for _ in range(n)]
    find.find(images[:1], geneval.SURE)
    start = time.perf_counter()
    find.find(images, geneval.SURE, 1 if device == "cpu" else 8)
    seconds = (time.perf_counter() - start) / n
    return {"what": f"Mask2Former Swin-S, a 512 x 512 picture, {device}", "seconds": seconds, "bare": "", "share": ""}


if __name__ == "__main__":
    main()
