"""The published size of BAGEL, counted on the meta device: nothing is allocated."""

import PIL.Image
import pytest

from diptych.core.sample import Image, Sample, user
from diptych.models import store, table
from diptych.models.bagel import Bagel
from diptych.models.published.bagel import BAGEL
from diptych.models.published.key_map import export, load
from diptych.models.published.parts import FLUX_AUTOENCODER
from diptych.training.parameters import by_part

# Published counts (of the tensors of ByteDance-Seed/BAGEL-7B-MoT).
COUNTS = {
    "decoder.text": 7_615_623_680,
    "decoder.image": 6_525_628_928,
    "vision": 402_552_736,
    "projector": 16_980_992,
    "autoencoder": 83_819_683,
}
TOTAL = 14_607_260_128  # all but the autoencoder, with both position tables
READING = 14_578_347_936  # the same without what only draws: latent linears, time embedding, latent table


@pytest.fixture(scope="module")
def model() -> Bagel:
    return store.create("bagel", table.config("bagel/7b-mot"), device="meta")


def test_nothing_is_allocated(model):
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_parameters(model):
    counts = {part: sum(p.numel() for p in parameters.values()) for part, parameters in by_part(model).items()}
    assert {part: counts[part] for part in COUNTS} == COUNTS
    latent, vision = model.latent_positions.numel(), model.vision_positions.numel()
    total = sum(counts.values()) - counts["autoencoder"] + latent + vision
    assert total == TOTAL
    assert total - counts["head"] - latent == READING


def test_checkpoint_names(model):
    """As many tensors as ``ema.safetensors`` and ``ae.safetensors`` hold, under their names; and back."""
    state = model.state_dict()
    theirs = export(BAGEL + FLUX_AUTOENCODER, state)
    coder = {n for n in theirs if n.startswith(("encoder.", "decoder."))}
    assert (len(theirs) - len(coder), len(coder)) == (1223, 244)
    shapes = {
        "language_model.lm_head.weight": (152064, 3584),
        "language_model.model.layers.27.self_attn.k_proj_moe_gen.bias": (512,),
        "language_model.model.layers.0.self_attn.q_norm_moe_gen.weight": (128,),
        "language_model.model.layers.5.mlp_moe_gen.down_proj.weight": (3584, 18944),
        "language_model.model.norm_moe_gen.weight": (3584,),
        "time_embedder.mlp.0.weight": (3584, 256),
        "llm2vae.weight": (64, 3584),
        "latent_pos_embed.pos_embed": (4096, 3584),
        "vit_pos_embed.pos_embed": (4900, 3584),
        "vit_model.vision_model.embeddings.patch_embedding.weight": (1152, 588),
        "vit_model.vision_model.encoder.layers.25.mlp.fc1.weight": (4304, 1152),
        "connector.fc1.weight": (3584, 1152),
        "decoder.up.3.block.2.conv1.weight": (512, 512, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    }
    assert {name: tuple(theirs[name].shape) for name in shapes} == shapes
    assert load(BAGEL + FLUX_AUTOENCODER, theirs, state).keys() == state.keys()


def test_a_checkpoint_without_position_tables_loads_and_one_without_a_weight_does_not(model):
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("autoencoder.")}
    theirs = export(BAGEL, state)
    del theirs["latent_pos_embed.pos_embed"], theirs["vit_pos_embed.pos_embed"]
    assert load(BAGEL, theirs, state)["latent_positions"] is state["latent_positions"]
    del theirs["connector.fc2.bias"]
    with pytest.raises(ValueError, match=r"missing connector.fc2.bias \(ours: projector.fc2.bias\)"):
        load(BAGEL, theirs, state)


def test_edits_have_the_published_settings_and_drawings_theirs(model):
    """Those of BAGEL's inferencer.py. What ships has settings of its own, and they are those of its edits too."""
    edit = Sample("e", (user(Image(PIL.Image.new("RGB", (32, 32)), "condition"), "make it red"),))
    drawn, edits = model.defaults(Sample("d", (user("a star"),))), model.defaults(edit)
    assert (drawn.image_guidance_scale, drawn.guidance_interval, drawn.renorm) == (1.0, (0.4, 1.0), "global")
    assert (edits.image_guidance_scale, edits.guidance_interval, edits.renorm) == (2.0, (0.0, 1.0), "text_channel")
    assert edits.guidance_scale == drawn.guidance_scale == 4.0 and edits.timestep_shift == drawn.timestep_shift == 3.0
    shipped = store.load("bagel/tiny")
    assert shipped.defaults(edit) == shipped.settings == shipped.config.settings
