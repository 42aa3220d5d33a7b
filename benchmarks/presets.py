"""What the presets for one GPU need by ``diptych plan``, on rows of nothing but pictures of 1024 x 1024 pixels.

python benchmarks/presets.py                # all; some seconds each
python benchmarks/presets.py iomm/b-24gb
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Mapping

import PIL.Image
import torch
from common import finish

from diptych import recipes
from diptych.core.sample import Image, Sample, assistant, user
from diptych.models import configs
from diptych.recipes.run import _self_conditioned
from diptych.training.plan import GIB, plan
from diptych.training.recipe import Recipe, Stage

FILLED = ("weights", "gradients", "optimizer", "average", "activations", "total")


class Largest:
    """A picture to read, a picture to draw, and so on; codes where a family has its pictures encoded beforehand."""

    def __init__(self, name: str, recipe: Recipe) -> None:
        self.name, self.recipe, self.blank = name, recipe, PIL.Image.new("RGB", (1024, 1024))
        self.config = configs.config_from_json(recipe.model)[1]

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int, /) -> Sample:
        read, drawn = self._picture("understand"), self._picture("target")
        if self.name.endswith("/pictures"):
            return Sample(str(index), (assistant(drawn),))
        if index % 2:
            return Sample(str(index), (user(read, "What is it?"), assistant("A lot of words. " * 12)))
        return Sample(str(index), (user("A lot of words. " * 12), assistant(drawn)))

    def _picture(self, role: str) -> Image:
        if self.recipe.model["family"] != "synergen":
            return Image(self.blank, role)  # type: ignore[arg-type]
        see, draw = self.config.see, self.config.draw(1024, 1024)
        tiles, side = (see.count(1024, 1024), see.side) if role == "understand" else (1, draw[0])
        codes = torch.zeros(tiles, side // 8, side // 8, dtype=torch.int16)
        return Image(None, role, (1024, 1024), encoded={"autoencoder": codes})  # type: ignore[arg-type]


def sources(recipe: Recipe, stage: Stage) -> Mapping[str, Largest]:
    return _self_conditioned({name: Largest(name, recipe) for name in stage.data}, stage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    rows = []
    for name in parser.parse_args().names or [n for n in recipes.RECIPES if n.endswith("gb")]:
        start = time.perf_counter()
        need = plan(recipes.find(name), sources)[-1]
        row = {k: getattr(need, k) / GIB for k in FILLED}
        room = int(re.search(r"(\d+)gb", name)[1])  # type: ignore[index]
        rows.append({"preset": name, "room": room, **row, "tokens": need.tokens, "s": time.perf_counter() - start})
    finish("presets", rows)


if __name__ == "__main__":
    main()
