"""BAGEL against numbers that the published code computed (tests/numbers/bagel/README.md): the same model and inputs,
every stage within 1e-4 and every id, position and mask exactly."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

from diptych.core.batch import pack
from diptych.core.mask import dense, rule
from diptych.core.noise import Noise
from diptych.core.sample import Image, Sample, assistant, user
from diptych.core.sequence import Kind, Segment, Sequence
from diptych.core.tensors import NONE
from diptych.models.bagel import Bagel, Config
from diptych.models.weights import BAGEL, export, load
from diptych.parts.autoencoder import AutoencoderConfig
from diptych.parts.decoder import DecoderConfig
from diptych.parts.flow import FlowSettings, TimeDraw, schedule
from diptych.parts.images import SizeRule, to_tensor
from diptych.parts.positions import grid_places, grid_table
from diptych.parts.tokenizer import Tokenizer
from diptych.parts.vision import VisionConfig, patchify

FOLDER = Path(__file__).parent / "numbers" / "bagel"
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


class Ids(Tokenizer):
    """The fixture's tokenizer: texts are ids."""

    markers = {"<|im_start|>": 121, "<|im_end|>": 122, "<|vision_start|>": 123, "<|vision_end|>": 124}

    def __init__(self) -> None:
        pass

    def __len__(self) -> int:
        return 125

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in text.split()]

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))

    def id(self, token: str) -> int:
        return self.markers[token]


@pytest.fixture(scope="module")
def meta() -> dict:
    return json.loads((FOLDER / "numbers.json").read_text())


@pytest.fixture(scope="module")
def numbers() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "numbers.safetensors")


def make(meta: dict) -> Bagel:
    llm, vit, vae, sizes = (meta["config"][k] for k in ("llm", "vit", "vae", "bagel"))
    names = [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "rms_norm_eps", "rope_theta", "qk_norm", "tie_word_embeddings",
    ]  # fmt: skip
    vision = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "patch_size",
        "image_size",
    ]
    config = Config(
        DecoderConfig(**{n: llm[n] for n in names}, routes=2, routed=("attention", "norms", "mlp")),
        VisionConfig(**{n: vit[n] for n in vision}),
        AutoencoderConfig(
            channels=vae["ch"],
            multipliers=tuple(vae["ch_mult"]),
            blocks=vae["num_res_blocks"],
            latent_channels=vae["z_channels"],
        ),
        latent_patch=sizes["latent_patch_size"],
        latent_side=sizes["max_latent_size"],
        see=SizeRule(longest=112, shortest=14, stride=14),
        draw=SizeRule(longest=128, shortest=16, stride=16),
    )
    model = Bagel(config, Ids())
    own = model.state_dict()
    state = {n: t for n, t in own.items() if not n.startswith("autoencoder.")}
    own |= load(BAGEL, load_file(FOLDER / "weights.safetensors"), state)
    model.load_state_dict(own)
    return model


@pytest.fixture(scope="module")
def model(meta) -> Bagel:
    return make(meta).eval()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, **CLOSE)


def blank(height: int, width: int) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (width, height))


# ---- components -------------------------------------------------------------------------------------------------


def test_weights_go_both_ways(model):
    theirs = load_file(FOLDER / "weights.safetensors")
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("autoencoder.")}
    back = export(BAGEL, state)
    assert set(back) - set(theirs) == {"latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"}
    assert set(theirs) <= set(back) and all(torch.equal(back[n], t) for n, t in theirs.items())


def test_timestep_embedding(model, numbers):
    t = numbers["components.timestep.t"]
    close(model.time.sinusoid(t), numbers["components.timestep.sinusoid"])
    close(model.time(t).detach(), numbers["components.timestep.embedding"])


def test_position_table_and_places(numbers):
    assert torch.equal(grid_table(8, 64), numbers["components.pos_embed.latent_table"])
    for size, grid in (("56x42", (4, 3)), ("112x28", (8, 2))):
        assert torch.equal(grid_places(grid, 8), numbers[f"components.pos_ids.extrapolate.{size}.p14.m8"])


def test_patchify(numbers):
    ours = patchify(numbers["components.patchify.image"][None], 14)[0]
    assert torch.equal(ours, numbers["components.patchify.tokens_p14"])


def test_dense_mask(meta, numbers):
    segments = tuple(
        Segment(Kind.NOISED if mode == "noise" else Kind.TEXT, (1,) * n, full=mode != "causal", hidden=mode == "noise")
        for n, mode in zip(meta["split_lens"], meta["attn_modes"], strict=True)
    )
    allowed = numbers["components.mask.allowed"].bool()
    assert torch.equal(dense(pack([Sequence("one", segments)])), allowed)


SIZE_RULES = {
    "vae_1024_512_16": SizeRule(1024, 512, 16),
    "vit_224_224_14": SizeRule(224, 224, 14),
    "vit_980_378_14_mp2007040": SizeRule(980, 378, 14, 2007040),
    "vit_980_224_14": SizeRule(980, 224, 14),
    "vit_518_224_14": SizeRule(518, 224, 14),
}


@pytest.mark.parametrize("name", SIZE_RULES)
def test_sizes(meta, name):
    assert set(meta["resize"]) == set(SIZE_RULES)
    for size, expected in meta["resize"][name].items():
        assert list(SIZE_RULES[name](*map(int, size.split("x")))) == expected, size


def test_resized_pixels(numbers):
    image = PIL.Image.fromarray(np.asarray(numbers["components.resize.pixels_in_hwc_u8"]))
    expected = numbers["components.resize.pixels_out_64_32_16_u8"]
    size = SizeRule(64, 32, 16)(*image.size)
    assert (size[1], size[0]) == tuple(expected.shape[1:])
    assert torch.equal(to_tensor(image, size), expected)


# ---- training ---------------------------------------------------------------------------------------------------


class RecordedNoise(Noise):
    """Gives the noise tokens that were recorded for each noised picture."""

    def __init__(self, draws: dict[tuple[str, str], torch.Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "draws", draws)

    def normal(self, sample, name, shape):
        found = self.draws[sample, name]
        assert tuple(found.shape) == tuple(shape)
        return found


class RecordedTimes(TimeDraw):
    def __init__(self, times: dict[str, torch.Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "times", times)

    def __call__(self, noise, owners, ordinals):
        assert set(ordinals) == {0}
        return torch.stack([self.times[o] for o in owners])


def pixels_of(patches: torch.Tensor, grid: tuple[int, int], patch: int = 14) -> torch.Tensor:
    """The picture whose patches these are."""
    return patches.view(*grid, patch, patch, 3).permute(4, 0, 2, 1, 3).reshape(3, grid[0] * patch, grid[1] * patch)


SEEN = [(4, 3), (5, 2), (2, 3)]  # grids of the pictures to understand, and below of the latents
LATENT = [(4, 3), (2, 3), (2, 3), (3, 2)]
NOISED = {"segment": 0, "edit": 2, "draw": 3}  # which of the latents are drawn, by sample


def training_samples(prompts: dict[str, list[int]]) -> list[Sample]:
    def text(name):
        return " ".join(map(str, prompts[name]))

    def seen(i, role="understand"):
        return Image(blank(SEEN[i][0] * 14, SEEN[i][1] * 14), role)

    def drawn(i, role="target"):
        return Image(blank(LATENT[i][0] * 16, LATENT[i][1] * 16), role)

    return [
        Sample("segment", (user(seen(0), text("segment")), assistant(drawn(0)))),
        Sample("ask", (user(seen(1), text("question")), assistant(text("answer")))),
        Sample("edit", (user(drawn(1, "condition"), text("edit")), assistant(drawn(2)))),
        Sample("draw", (user(text("caption")), assistant(drawn(3)))),
        Sample("chat", (user(text("chat")), assistant(text("reply")))),
    ]


def training_batch(model: Bagel, meta: dict, numbers: dict):
    """Our layout of the five samples, with the recorded pictures in place of blank ones."""
    patches = iter(numbers["training.in.packed_vit_tokens"].split([12, 10, 6]))
    latents = iter(
        z[:, : 2 * h, : 2 * w] for z, (h, w) in zip(numbers["training.in.padded_latent"], LATENT, strict=True)
    )
    seen = iter(SEEN)

    def fill(s: Segment) -> Segment:
        if s.kind == Kind.VISION:
            grid = next(seen)
            return replace(
                s,
                grid=grid,
                image=pixels_of(next(patches), grid),
                ids=(s.ids[0], *[NONE] * grid[0] * grid[1], s.ids[-1]),
            )
        if s.kind in (Kind.CLEAN, Kind.NOISED):
            return replace(s, image=next(latents), encoded=True)
        return s

    laid = [model.lay_out(s) for s in training_samples(meta["prompts"])]
    return pack([replace(q, segments=tuple(map(fill, q.segments))) for q in laid], model.routes)


def recorded(model: Bagel, numbers: dict) -> RecordedNoise:
    """The recorded noise; the recorded times go into the model's config."""
    noise = numbers["training.in.noise"].split([h * w for h, w in LATENT])
    logits = numbers["training.in.packed_timesteps"].split([h * w for h, w in LATENT])
    times = {name: torch.sigmoid(logits[i][0]) for name, i in NOISED.items()}
    model.config = replace(model.config, times=RecordedTimes(times))
    return RecordedNoise({(name, "noise0"): noise[i] for name, i in NOISED.items()})


def test_layout(model, meta, numbers):
    batch = training_batch(model, meta, numbers)
    n = {k.removeprefix("training.in."): v for k, v in numbers.items() if k.startswith("training.in.")}
    assert list(batch.lengths) == meta["sample_lens"]
    words = (batch.ids != NONE).nonzero()[:, 0]
    assert torch.equal(words, n["packed_text_indexes"])
    assert torch.equal(batch.ids[words], n["packed_text_ids"])
    assert torch.equal(batch.positions, n["packed_position_ids"])
    assert torch.equal(batch.routes[1], n["packed_vae_token_indexes"])
    supervised = (batch.targets != NONE).nonzero()[:, 0]
    assert torch.equal(supervised, n["ce_loss_indexes"])
    assert torch.equal(batch.targets[supervised], n["packed_label_ids"])
    seen = torch.cat([g.tokens.flatten() for g in batch.of(Kind.VISION)]).sort().values
    assert torch.equal(seen, n["packed_vit_token_indexes"])
    noised = torch.cat([g.tokens.flatten() for g in batch.of(Kind.NOISED)]).sort().values
    assert torch.equal(noised, n["mse_loss_indexes"])
    at = 0
    for d, length in enumerate(batch.lengths):
        places = torch.arange(at, at + length)
        assert torch.equal(rule(batch, places[:, None], places[None]), n[f"attention_allowed.{d}"].bool())
        at += length


def test_training_numbers(meta, numbers):
    """Residual stream of every layer, velocity, logits, both losses, and gradients."""
    model = make(meta)
    batch, noise = training_batch(model, meta, numbers), recorded(model, numbers)
    n = {k.removeprefix("training.out."): v for k, v in numbers.items() if k.startswith("training.out.")}
    order = torch.cat(batch.routes)
    kept: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(module, inputs, output):
            rows = output.detach().reshape(-1, output.shape[-1])
            kept[name] = torch.cat([kept[name], rows]) if name in kept else rows

        return hook

    for i, layer in enumerate(model.decoder.layers):
        layer.register_forward_hook(keep(f"layer.{i}"))
    model.decoder.register_forward_hook(keep("language_model"))
    model.vision.register_forward_hook(keep("vit_model"))
    model.projector.register_forward_hook(keep("connector"))
    model.latent_out.register_forward_hook(keep("llm2vae"))
    losses = model.losses(batch, noise)

    for name in ("layer.0", "layer.1", "layer.2", "language_model"):
        close(kept[name], n[name][order])
    seen = torch.cat([g.tokens.flatten() for g in batch.of(Kind.VISION)])
    for name in ("vit_model", "connector"):
        close(kept[name], n[name][seen.argsort().argsort()])
    drawn = torch.cat([g.tokens.flatten() for g in batch.of(Kind.NOISED)])
    close(kept["llm2vae"], n["llm2vae"][drawn.argsort().argsort()])
    supervised = (batch.targets != NONE).nonzero()[:, 0]
    close(model.decoder.logits(n["language_model"][supervised]).detach(), n["lm_head"])

    text, image = losses["text"], losses["image"]
    assert (text.count, image.count) == (9, 24)
    close(text.sum.detach(), n["ce_per_token"].sum())
    close(image.sum.detach(), n["mse_per_element"].mean(-1).sum())
    total = 1.5 * text.sum / text.count + image.sum / image.count
    close(torch.stack([text.sum / text.count, image.sum / image.count, total]).detach(), n["loss_ce_mse_total"])

    total.backward()
    gradients = export(BAGEL, {k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    listed = {k.removeprefix("training.grad."): v for k, v in numbers.items() if k.startswith("training.grad.")}
    assert len(listed) == 11
    for name, gradient in listed.items():
        torch.testing.assert_close(gradients[name], gradient, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
    assert set(gradients) == set(meta["grad_norms"])
    for name, norm in meta["grad_norms"].items():
        assert float(gradients[name].norm()) == pytest.approx(norm, rel=1e-4, abs=1e-6), name


def test_four_optimiser_steps(meta, numbers):
    model = make(meta)
    batch, noise = training_batch(model, meta, numbers), recorded(model, numbers)
    trained = [p for n, p in model.named_parameters() if not n.startswith("autoencoder.")]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    seen = []
    for _ in range(4):
        losses = model.losses(batch, noise)
        text, image = (losses[k].sum / losses[k].count for k in ("text", "image"))
        seen.append(torch.stack([text, image]).detach())
        optimiser.zero_grad()
        (1.5 * text + image).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
    expected = numbers["training.out.adamw_trajectory_ce_mse"]
    torch.testing.assert_close(torch.stack(seen), expected, atol=1e-3, rtol=1e-3)


# ---- reading and drawing ----------------------------------------------------------------------------------------


def text_segment(model: Bagel, ids: list[int]) -> Sequence:
    return model.lay_out(Sample("words", (user(" ".join(map(str, ids))),)))


def with_images(laid: Sequence, images: dict[Kind, torch.Tensor], encoded: frozenset[Kind] = frozenset()) -> Sequence:
    """The layout of a blank picture with recorded pictures in its place; one to see may have another shape."""

    def fill(s: Segment) -> Segment:
        if s.kind == Kind.VISION:
            grid = (images[s.kind].shape[-2] // 14, images[s.kind].shape[-1] // 14)
            s = replace(s, image=None, grid=grid, ids=(s.ids[0], *[NONE] * grid[0] * grid[1], s.ids[-1]))
        return replace(s, image=images[s.kind], encoded=s.kind in encoded) if s.kind in images else s

    return replace(laid, segments=tuple(map(fill, laid.segments)))


def check_cache(context, numbers: dict, name: str) -> None:
    for layer in range(3):
        for i, what in enumerate("kv"):
            if (key := f"{name}.{what}.{layer}") in numbers:
                close(context.cache.buffer[layer, i, : context.length], numbers[key])


def test_understanding(model, meta, numbers):
    image = numbers["understanding.in.image"]
    sample = Sample("ask", (user(Image(blank(56, 42)), " ".join(map(str, meta["prompts"]["question"]))),))
    laid = with_images(model.lay_out(sample), {Kind.VISION: image})
    [context] = model.extend([model.open()], [laid])
    assert (context.length, context.position) == (21, 8)
    check_cache(context, numbers, "understanding.out.cache_after_text")
    tokens, rows = [model.markers["bos"]], []
    for _ in range(6):
        [context] = model.extend([context], [model.reply(tokens[-1:])])
        rows.append(context.logits)
        tokens.append(int(context.logits.argmax()))
    assert tokens[:6] == numbers["understanding.out.tokens"].flatten().tolist()
    close(torch.stack(rows), numbers["understanding.out.step_logits"])


def trajectory(model: Bagel, contexts, settings: FlowSettings, canvas, starts: torch.Tensor):
    """Velocities, times and final tokens of drawing from given noise, one picture for each entry of ``contexts``."""
    count = len(contexts)
    drawings = model.start(contexts, [canvas] * count, [settings] * count, [0] * count)
    drawings = [replace(d, state=x) for d, x in zip(drawings, starts, strict=True)]
    times, velocities = [], []
    while not drawings[0].done:
        times.append(schedule(drawings[0].steps, settings.timestep_shift)[drawings[0].step])
        drawings = model.step(drawings)
        velocities.append(torch.cat([d.slot[1] for d in drawings]))
    return torch.stack(times), torch.stack(velocities), torch.stack([d.state for d in drawings])


def draw_settings(args: dict) -> FlowSettings:
    """``num_timesteps`` counts the ends, so it is one more than our steps."""
    return FlowSettings(
        args["num_timesteps"] - 1,
        guidance_scale=args.get("cfg_text_scale", 1.0),
        image_guidance_scale=args.get("cfg_img_scale", 1.0),
        guidance_interval=tuple(args.get("cfg_interval", (0.0, 1.0))),
        timestep_shift=args["timestep_shift"],
        renorm=args.get("cfg_renorm_type", "none"),
        renorm_min=args.get("cfg_renorm_min", 0.0),
    )


@pytest.mark.parametrize("group", ["plain", "cfg_global", "cfg_channel", "cfg_text_channel"])
def test_generation(model, meta, numbers, group):
    settings = draw_settings(meta["generation"][group])
    [context] = model.extend([model.open()], [text_segment(model, meta["prompts"]["caption"])])
    check_cache(context, numbers, "generation.out.text_cache")
    branches = model.branches(Sample("draw", (user("words"), assistant(Image(None, "target")))), settings)
    assert len(branches) == (1 if group == "plain" else 2)
    contexts = (context, model.open())[: len(branches)]
    start = numbers[f"generation.in.{group}.packed_init_noises"][None]
    times, velocities, final = trajectory(model, [contexts], settings, (48, 32), start)
    close(times, numbers[f"generation.out.{group}.t"])
    close(velocities, numbers[f"generation.out.{group}.velocity"])
    close(final[0], numbers[f"generation.out.{group}.latent.0"])


def test_generation_of_two_at_once(model, meta, numbers):
    """The published code packs two prompts; we batch their steps."""
    settings = draw_settings(meta["generation"]["pair"])
    read = [text_segment(model, meta["prompts"][name]) for name in ("caption", "short")]
    contexts = model.extend([model.open(), model.open()], read)
    starts = numbers["generation.in.pair.packed_init_noises"].view(2, 6, 16)
    times, velocities, final = trajectory(model, [(c,) for c in contexts], settings, (48, 32), starts)
    close(times, numbers["generation.out.pair.t"])
    close(velocities, numbers["generation.out.pair.velocity"])
    close(final, torch.stack([numbers[f"generation.out.pair.latent.{i}"] for i in range(2)]))


@pytest.mark.parametrize("group", ["dual_global", "dual_channel", "dual_text_channel"])
def test_editing(model, meta, numbers, group):
    """Text and image guidance together; the three contexts come from our own layout."""
    settings = draw_settings(meta["editing"][group])
    words = " ".join(map(str, meta["prompts"]["edit"]))
    sample = Sample("edit", (user(Image(blank(48, 32), "condition"), words), assistant(Image(None, "target"))))
    images = {Kind.CLEAN: numbers["editing.in.vae_latent"], Kind.VISION: numbers["editing.in.vit_image"]}

    def read(drop):
        laid = with_images(model.lay_out(sample, drop), images, encoded=frozenset({Kind.CLEAN}))
        return model.extend([model.open()], [laid])[0]

    contexts = tuple(read(drop) for drop in model.branches(sample, settings))
    assert [[[c.length], [c.position]] for c in contexts] == meta["editing_lengths_positions"]
    check_cache(contexts[0], numbers, "editing.out.cache_full")
    start = numbers[f"editing.in.{group}.packed_init_noises"][None]
    times, velocities, final = trajectory(model, [contexts], settings, (48, 32), start)
    close(times, numbers[f"editing.out.{group}.t"])
    close(velocities, numbers[f"editing.out.{group}.velocity"])
    close(final[0], numbers[f"editing.out.{group}.latent.0"])
