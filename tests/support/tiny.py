"""The smallest model of every family and samples of every task: what the suites share.

A new family is one line in ``FAMILIES``.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, replace

import numpy as np
import PIL.Image
import torch

from diptych.core.sample import Image, Sample, Text, assistant, user
from diptych.models import bagel as bagel_family
from diptych.models import cheers as cheers_family
from diptych.models import configs, store
from diptych.models import iomm as iomm_family
from diptych.models import omnigen2 as omnigen2_family
from diptych.models import synergen as synergen_family
from diptych.models.protocol import UnifiedModel
from diptych.parts.autoencoder import AutoencoderConfig
from diptych.parts.decoder import DecoderConfig
from diptych.parts.dit import DitConfig
from diptych.parts.flow import TimeDraw
from diptych.parts.images import SizeRule, Tiling
from diptych.parts.mllm_sizes import tiny_qwen25_vl
from diptych.parts.vision import VisionConfig
from diptych.training.recipe import Limits, Optimizer, Recipe, Stage

ANY = SizeRule(longest=128, shortest=16, stride=16)  # the smallest models take pictures of many shapes


def bagel() -> bagel_family.Config:
    """BAGEL with two layers of width 32; 64 pixels are 16 tokens."""
    c = bagel_family.Config.tiny()
    return replace(
        c,
        decoder=replace(
            c.decoder,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        vision=VisionConfig(32, 48, 1, 2, patch_size=16, image_size=128),
        autoencoder=AutoencoderConfig(
            channels=4,
            multipliers=(1, 1, 1, 1),
            blocks=1,
            latent_channels=4,
            groups=2,
            posterior=False,
            statistics=True,
        ),
        see=ANY,
        draw=ANY,
        size=(32, 32),
        settings=replace(c.settings, num_inference_steps=4),
    )


def synergen() -> synergen_family.Config:
    """SynerGen-VL with two layers of width 32; 32 pixels are 4 x 2 tokens of 2 x 4 codes."""
    c = synergen_family.Config.tiny()
    return replace(
        c,
        decoder=replace(c.decoder, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
        head=DecoderConfig(36, 24, 32, 2, 2, 1),
        autoencoder=AutoencoderConfig(
            "vq", 4, (1, 1, 1), blocks=1, latent_channels=2, groups=2, posterior=False, levels=(6, 6)
        ),
        fold=(2, 4),
        embed_size=8,
        grid=(8, 8),
        see=Tiling(32, most=3, thumbnail=True),
        draw=ANY,
        size=(32, 32),
    )


def iomm() -> iomm_family.Config:
    """IOMM with two layers of width 32 everywhere; 64 pixels are 16 tokens."""
    c = iomm_family.Config.tiny()
    model = deepcopy(c.mllm.model)
    model["vision_config"] |= {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    model["text_config"] |= {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    return replace(
        c,
        mllm=replace(c.mllm, model=model),
        dit=DitConfig("double", 32, 2, 2, (0, 8, 8)),
        autoencoder=bagel().autoencoder,
        queries=4,
        draw=ANY,
        size=(32, 32),
        settings=replace(c.settings, num_inference_steps=4),
    )


def cheers() -> cheers_family.Config:
    """Cheers with two layers of width 32; 64 pixels are 16 tokens and 64 latents."""
    c = cheers_family.Config.tiny()
    small = bagel()
    return replace(
        c,
        decoder=replace(small.decoder, vocab_size=1032, routes=1, routed=(), tie_word_embeddings=True),
        vision=VisionConfig(32, 48, 1, 4, patch_size=8, image_size=32),
        autoencoder=small.autoencoder,
        sizes=ANY,
        size=(32, 32),
        prediction="velocity",  # and mild guidance: rounding grows with every look at the picture
        settings=replace(c.settings, num_inference_steps=4, guidance_scale=1.5, timestep_shift=1.0),
    )


def omnigen2() -> omnigen2_family.Config:
    """OmniGen2 with two layers of width 32, over the classes of its published reader; 64 pixels are 16 tokens. Like the
    release, it predicts velocities."""
    c, reader = omnigen2_family.Config.tiny(), tiny_qwen25_vl(1032)
    model = deepcopy(reader.model)
    model |= {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    model["rope_scaling"] |= {"mrope_section": [2, 1, 1]}
    model["vision_config"] |= {
        "hidden_size": 32,
        "depth": 1,
        "num_heads": 2,
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }
    return replace(
        c,
        mllm=replace(reader, model=model),
        dit=replace(c.dit, hidden_size=32, layers=2, refiners=1, heads=2, kv_heads=1, axes=(4, 6, 6), text_width=32),
        autoencoder=bagel().autoencoder,
        prediction="velocity",
        times=TimeDraw(shift=3.0),
        size=(32, 32),
        settings=replace(c.settings, num_inference_steps=4),
        edits=None,
    )


FAMILIES = {
    "bagel": bagel,
    "iomm": iomm,
    "cheers": cheers,
    "synergen": synergen,
    "omnigen2": omnigen2,
}


def model(family: str, seed: int = 0) -> UnifiedModel:
    """A fresh model as training starts with it."""
    torch.manual_seed(seed)  # for what ``initialise`` leaves alone: a frozen autoencoder
    made = store.create(family, FAMILIES[family]())
    made.initialise(seed)
    return made.eval()


def sampling(family: str) -> UnifiedModel:
    """A random model whose autoencoder has a posterior: what it makes of a picture has noise of its own."""
    config = FAMILIES[family]()
    spread = replace(config.autoencoder, posterior=True, statistics=False)
    made = store.create(family, replace(config, autoencoder=spread))
    made.initialise(0)
    return shake(made.eval())


def shake(made: UnifiedModel, seed: int = 1) -> UnifiedModel:
    """Moves every parameter by about what fresh weights are, so that nothing is zero or equal because of how they begin
    and rounding does not grow to something that one sees."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (min(0.2, p[0].numel() ** -0.5) if p.dim() > 1 else 0.1))
    return made


def shake_only(made: UnifiedModel, *modules: str) -> UnifiedModel:
    """``shake`` for some modules of a model."""
    for module in modules:
        shake(made.get_submodule(module))
    return made


def picture(seed: int, width: int = 32, height: int = 32) -> PIL.Image.Image:
    """Blocks of random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(colours).resize((width, height), PIL.Image.Resampling.NEAREST)


def say(name: str = "say") -> Sample:
    return Sample(name, (user("hello"), assistant("a red circle")))


def ask(name: str = "ask", seed: int = 0, question: str = "how many stars are there?", answer: str = "two") -> Sample:
    return Sample(name, (user(Image(picture(seed)), question), assistant(answer)))


def draw(name: str = "draw", seed: int = 1, prompt: str = "a blue star", size=(32, 32)) -> Sample:
    return Sample(name, (user(prompt), assistant(Image(picture(seed, *size), "target"))))


def edit(name: str = "edit", seed: int = 2, size=(32, 48)) -> Sample:
    source, target = Image(picture(seed, *size), "condition"), Image(picture(seed + 100, *size), "target")
    return Sample(name, (user(source, "make the star red"), assistant(target)))


def story(name: str = "story", seed: int = 3) -> Sample:
    """Several turns: a picture drawn, then talked about."""
    drawn = Image(picture(seed), "target")
    return Sample(
        name,
        (
            user("a green square"),
            assistant(drawn, "done"),
            user("what colour is it?"),
            assistant(Text("green", loss=True)),
        ),
    )


def samples() -> list[Sample]:
    """One of every task; pictures of three shapes."""
    return [say(), ask(), draw(), edit(), story(), draw("wide", 7, "two red squares", (64, 32))]


def request(sample: Sample) -> Sample:
    """The sample without its last answer: what a user sends."""
    return replace(sample, messages=sample.messages[:-1])


def recipe(**changes) -> Recipe:
    """A complete run of a few seconds; ``changes`` are fields of its one stage or of the recipe."""
    stage = Stage(
        "unified",
        steps=10,
        train={"decoder": 2e-3, "vision": 2e-3, "projector": 2e-3, "head": 2e-3},
        data={"shapes/draw": 0.5, "shapes/ask": 0.3, "shapes/edit": 0.2},
        loss={"text": 0.3, "image": 1.0},
        optimizer=Optimizer("muon"),
        limits=Limits(tokens=192, pictures=16),
        dropout={"text": 0.1},
        ema=0.9,
    )
    in_stage = {k: v for k, v in changes.items() if k in Stage.__dataclass_fields__ and k != "name"}
    in_recipe = {k: v for k, v in changes.items() if k not in in_stage}
    row = configs.config_to_json("bagel", bagel())
    base = Recipe("test", row, (replace(stage, **in_stage),), size=32, workers=0, streams=4, checkpoint_every=5)
    return replace(base, **in_recipe)


def having(model, **settings):
    """Those of the settings that the family has."""
    return {name: value for name, value in settings.items() if name in asdict(model.settings)}
