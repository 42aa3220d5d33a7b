"""Seconds for a 64 x 64 picture with 20 guided steps: one alone, and eight in a batch.

python benchmarks/draw.py [MODEL]
"""

import sys

from common import best, finish

import diptych


def main() -> None:
    engine = diptych.load(sys.argv[1] if len(sys.argv) > 1 else "bagel/tiny", "cpu")
    rows = []
    for n in (1, 8):
        seconds = best(lambda n=n: engine.generate("a red circle", n, (64, 64), num_inference_steps=20))
        rows.append({"pictures": n, "seconds": seconds, "seconds a picture": seconds / n})
    finish("draw", rows, steps=20, guidance=engine.model.settings.guidance_scale)


if __name__ == "__main__":
    main()
