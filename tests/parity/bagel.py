"""BAGEL against numbers of the published code, stage by stage; nothing here knows the sizes of one folder.

Each stage takes a ``Folder`` and compares everything that its file holds: inputs are what our layout must come to,
outputs what our network must compute. Without ``ae.safetensors`` the autoencoder is left out, and
``latents.safetensors`` gives the one picture that was encoded with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from diptych.analysis import collect, published
from diptych.core.batch import Batch, pack
from diptych.core.layout import Kind, Layout, Segment
from diptych.core.mask import dense, rule
from diptych.core.noise import Noise
from diptych.core.sample import Image, Sample, assistant, user
from diptych.core.tensors import NONE, Tensor, to_float
from diptych.models.bagel import Bagel, Config, Settings
from diptych.models.protocol import NOTHING, Context
from diptych.models.published.bagel import BAGEL, published_config
from diptych.models.published.key_map import export, load
from diptych.models.published.parts import FLUX_AUTOENCODER
from diptych.parts.attention import inverse_permutation
from diptych.parts.flow import TimeDraw, shift_time, squared_error
from diptych.parts.images import SizeRule, latents_to_tokens, to_tensor, tokens_to_latents
from diptych.parts.positions import grid_places, grid_table
from diptych.parts.tokenizer import Tokenizer
from diptych.parts.vision import patchify
from tests.parity.compare import TRACK, Folder

TEXT, IMAGE = frozenset({"text"}), frozenset({"image"})
WEIGHTS = ("ema", "ae")
LOSS = 1.5  # weight of the words' loss beside the pictures' in the recorded total


class Ids(Tokenizer):
    """Texts are ids; the markers are the folder's."""

    def __init__(self, special: dict[str, int]) -> None:
        self.markers = {
            "<|im_start|>": special["bos_token_id"],
            "<|im_end|>": special["eos_token_id"],
            "<|vision_start|>": special["start_of_image"],
            "<|vision_end|>": special["end_of_image"],
        }

    def __len__(self) -> int:
        return 0

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in text.split()]

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))

    def id(self, token: str) -> int:
        return self.markers[token]


def config(folder: Folder) -> Config:
    """The folder's sizes, and size rules that leave every whole number of patches alone."""
    c = folder.config
    json = {
        "llm_config.json": c["llm"],
        "vit_config.json": c["vit"],
        "config.json": c["bagel"] | {"vae_config": c["vae"]},
    }
    states = {n: weights(folder, n) for n in ("ema", "ae")}
    made = published_config(json, states)
    vae, side = c["vae"], c["bagel"]["vit_max_num_patch_per_side"]
    coder = replace(
        made.autoencoder,
        channels=vae["ch"],
        multipliers=tuple(vae["ch_mult"]),
        blocks=vae["num_res_blocks"],
        latent_channels=vae["z_channels"],
    )
    vision = replace(made.vision, num_hidden_layers=c["vit"]["num_hidden_layers"])
    patch = c["bagel"]["latent_patch_size"]
    free = {"longest": 1 << 20, "shortest": 1, "pixels": 1 << 40}
    return replace(
        made,
        vision=vision,
        autoencoder=coder,
        latent_patch=patch,
        latent_side=c["bagel"]["max_latent_size"],
        vision_side=None if side == vision.side else side,
        see=SizeRule(stride=vision.patch_size, **free),
        draw=SizeRule(stride=patch * coder.downsample, **free),
    )


def weights(folder: Folder, stem: str) -> dict[str, Tensor]:
    """The tensors of a file of weights; none where it is not there."""
    return load_file(folder.path / f"{stem}.safetensors") if folder.has(stem) else {}


def model(folder: Folder) -> Bagel:
    """The folder's model in float32; its autoencoder is left as it is where the folder has none."""
    made = Bagel(config(folder), Ids(folder.config["special_tokens"]))
    own = made.state_dict()
    for stem, rules, mine in (("ema", BAGEL, False), ("ae", FLUX_AUTOENCODER, True)):
        expected = {n: t for n, t in own.items() if n.startswith("autoencoder.") == mine}
        if folder.has(stem):
            made.load_state_dict(load(rules, weights(folder, stem), expected), strict=False)
    return made.eval()


def blank(height: int, width: int) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (width, height))


def words(folder: Folder, name: str) -> str:
    """A prompt of the folder."""
    return " ".join(map(str, folder.meta["prompts"][name]))


# ---- weights and components -------------------------------------------------------------------------------------


def both_ways(folder: Folder) -> None:
    """Every published tensor comes back from our names unchanged."""
    state = model(folder).state_dict()
    for stem, rules, mine in (("ema", BAGEL, False), ("ae", FLUX_AUTOENCODER, True)):
        theirs = weights(folder, stem)
        back = export(rules, {n: t for n, t in state.items() if n.startswith("autoencoder.") == mine})
        tables = {"latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"}
        if theirs:
            folder.same(f"{stem}: names", sorted(back.keys() - tables), sorted(theirs.keys() - tables))
            folder.same(f"{stem}: values", [n for n in theirs if not torch.equal(back[n], theirs[n])], [])


def components(folder: Folder) -> None:
    """Time features, position tables, patches, the attention rule, resizing and the autoencoder."""
    c, made, meta = config(folder), model(folder), folder.meta["components"]
    at = "components."
    t = folder.get(f"{at}timestep.t")
    folder.close(f"{at}timestep.sinusoid", made.time.sinusoid(t))
    folder.close(f"{at}timestep.embedding", made.time(t))
    folder.close(f"{at}pos_embed.latent_table", made.latent_positions)
    folder.close(f"{at}pos_embed.vit_table", made.vision_positions)
    folder.close("latent table, computed", grid_table(c.latent_side, c.decoder.hidden_size), made.latent_positions)
    for name in folder.names(f"{at}pos_ids."):
        how, height, width, patch, side = re.fullmatch(r".*\.(\w+)\.(\d+)x(\d+)\.p(\d+)\.m(\d+)", name).groups()
        grid = (int(height) // int(patch), int(width) // int(patch))
        folder.same(name, grid_places(grid, int(side), stretch=how == "interpolate"))
    [name] = folder.names(f"{at}patchify.tokens_p")
    image = folder.get(f"{at}patchify.image")
    folder.close(name, patchify(image[None], int(name.rpartition("_p")[2]))[0], tolerance=0.0)
    segments = tuple(
        Segment(Kind.NOISED if mode == "noise" else Kind.TEXT, (1,) * n, full=mode != "causal", hidden=mode == "noise")
        for n, mode in zip(meta["mask.split_lens"], meta["mask.attn_modes"], strict=True)
    )
    folder.same(f"{at}mask.dense_additive_finite", dense(pack([Layout("one", segments)])).float() - 1)
    for name, sizes in meta["resize.wh_in_to_wh_out"].items():
        longest, shortest, stride, _, most = re.fullmatch(r"\w+?_(\d+)_(\d+)_(\d+)(_mp(\d+))?", name).groups()
        how = SizeRule(int(longest), int(shortest), int(stride), **({"pixels": int(most)} if most else {}))
        for size, expected in sizes.items():
            folder.same(f"{at}resize {name} {size}", list(how(*map(int, size.split("x")))), expected)
    pixels = PIL.Image.fromarray(np.asarray(folder.get(f"{at}resize.pixels_in_hwc_u8")))
    for name in folder.names(f"{at}resize.pixels_out_"):
        how = SizeRule(*map(int, name.split("_")[-3:]))
        folder.close(name, to_float(to_tensor(pixels, how(*pixels.size))))
    if folder.has("ae"):
        with torch.no_grad():
            autoencoder(folder, made)


def autoencoder(folder: Folder, made: Bagel) -> None:
    """Moments, sampled latents, reconstruction, and what padding with zeros does to a small picture."""
    at, coder = "components.vae.", made.autoencoder
    image = folder.get(f"{at}image")
    folder.close(f"{at}moments", coder.moments(image))
    folder.close(f"{at}latent", coder.encode(image, folder.get(f"{at}eps")))
    folder.close(f"{at}decoded", coder.decode(folder.get(f"{at}latent")))
    small = folder.get(f"{at}pad_effect.small_image")
    alone = coder.moments(small).chunk(2, 1)[0]
    folder.close(f"{at}pad_effect.mean_alone", alone)
    for name in folder.names(f"{at}pad_effect.mean_in_"):
        height, width = map(int, re.search(r"(\d+)x(\d+)", name).groups())
        canvas = F.pad(small, (0, width - small.shape[-1], 0, height - small.shape[-2]))
        inside = coder.moments(canvas).chunk(2, 1)[0][..., : alone.shape[-2], : alone.shape[-1]]
        folder.close(name, inside)


# ---- training ---------------------------------------------------------------------------------------------------


class RecordedNoise(Noise):
    """Gives the noise tokens that were recorded for each noised picture."""

    def __init__(self, draws: dict[tuple[str, str], Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "draws", draws)

    def normal(self, sample, name, shape):
        found = self.draws[sample, name]
        assert tuple(found.shape) == tuple(shape)
        return found


class RecordedTimes(TimeDraw):
    """Gives the recorded time of each sample's one noised picture."""

    def __init__(self, times: dict[str, Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "times", times)

    def __call__(self, noise, owners, ordinals):
        assert set(ordinals) == {0}
        return torch.stack([self.times[o] for o in owners])


def grid_of(places: Tensor, side: int) -> tuple[int, int]:
    """(rows, columns) of a grid from its tokens' places in a table."""
    return len({int(p) // side for p in places}), len({int(p) % side for p in places})


def pixels_of(patches: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The picture whose patches these are."""
    return patches.view(*grid, patch, patch, 3).permute(4, 0, 2, 1, 3).reshape(3, grid[0] * patch, grid[1] * patch)


@dataclass(frozen=True)
class Pack:
    """The five recorded samples: their pictures, and which of the latents each draws."""

    samples: tuple[Sample, ...]
    seen: tuple[tuple[int, int], ...]  # grids of the pictures to understand, and below of the latents
    latent: tuple[tuple[int, int], ...]
    noised: dict[str, int]


def the_pack(folder: Folder, c: Config) -> Pack:
    """Segmentation, a question, an edit, a drawing and a chat, at the folder's sizes."""
    sizes = folder.get("training.in.vit_token_seqlens").tolist()
    seen = [grid_of(p, c.seen_side) for p in folder.get("training.in.packed_vit_position_ids").split(sizes)]
    latent = [(h, w) for h, w in folder.meta["training"]["in.patchified_vae_latent_shapes"]]

    def see(i: int) -> Image:
        return Image(blank(*(n * c.vision.patch_size for n in seen[i])), "understand")

    def draw(i: int, role: str = "target") -> Image:
        return Image(blank(*(n * c.stride for n in latent[i])), role)

    def text(name: str) -> str:
        return words(folder, name)

    samples = (
        Sample("segment", (user(see(0), text("segment")), assistant(draw(0)))),
        Sample("ask", (user(see(1), text("question")), assistant(text("answer")))),
        Sample("edit", (user(draw(1, "condition"), text("edit")), assistant(draw(2)))),
        Sample("draw", (user(text("caption")), assistant(draw(3)))),
        Sample("chat", (user(text("chat")), assistant(text("reply")))),
    )
    return Pack(samples, tuple(seen), tuple(latent), {"segment": 0, "edit": 2, "draw": 3})


def lay_out(folder: Folder, made: Bagel, pictures: Pack, dropped: frozenset[str] = frozenset()) -> list[Layout]:
    """Our layout of the samples with the recorded pictures in place of blank ones; ``dropped`` lose their words."""
    c = made.config
    patches = iter(folder.get("training.in.packed_vit_tokens").split([h * w for h, w in pictures.seen]))
    recorded = zip(folder.get("training.in.padded_latent"), pictures.latent, strict=True)
    latents = iter(z[:, : c.latent_patch * h, : c.latent_patch * w] for z, (h, w) in recorded)
    seen = iter(pictures.seen)

    def fill(s: Segment) -> Segment:
        if s.kind == Kind.VISION:
            grid = next(seen)
            image = pixels_of(next(patches), grid, c.vision.patch_size)
            return replace(s, grid=grid, image=image, ids=(s.ids[0], *[NONE] * grid[0] * grid[1], s.ids[-1]))
        if s.kind in (Kind.CLEAN, Kind.NOISED):
            return replace(s, image=next(latents), encoded=True)
        return s

    laid = [made.lay_out(s, TEXT if s.id in dropped else NOTHING) for s in pictures.samples]
    return [replace(q, segments=tuple(map(fill, q.segments))) for q in laid]


def recorded(folder: Folder, made: Bagel, pictures: Pack) -> RecordedNoise:
    """The recorded noise; the recorded times go into the model's config."""
    counts = [h * w for h, w in pictures.latent]
    noise = folder.get("training.in.noise").split(counts)
    logits = folder.get("training.in.packed_timesteps").split(counts)
    shift = made.config.times.shift
    times = {name: shift_time(torch.sigmoid(logits[i][0]), shift) for name, i in pictures.noised.items()}
    made.config = replace(made.config, times=RecordedTimes(times))
    return RecordedNoise({(name, "noise0"): noise[i] for name, i in pictures.noised.items()})


def ascending(batch: Batch, *kinds: Kind) -> Tensor:
    """The places of all pictures' tokens of these kinds, in the order in which our groups hold them."""
    found = [g.tokens.flatten() for kind in kinds for g in batch.of(kind)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)


def layout(folder: Folder) -> None:
    """Ids, places, positions, targets and masks of the pack, also with words dropped and padded for block masks."""
    made, at = model(folder), "training."
    pictures, meta = the_pack(folder, made.config), folder.meta["training"]
    laid = lay_out(folder, made, pictures)
    batch = pack(laid, made.routes)
    folder.same("sequence_length", len(batch), meta["in.sequence_length"])
    folder.same("sample_lens", list(batch.lengths), meta["in.sample_lens"])
    index_tensors(folder, batch, f"{at}in.")
    c = made.config
    places = [grid_places(g, c.seen_side, stretch=c.stretch) for g in pictures.seen]
    folder.same(f"{at}in.packed_vit_position_ids", torch.cat(places))
    places = [grid_places(g, c.latent_side, stretch=c.stretch) for g in pictures.latent]
    folder.same(f"{at}in.packed_latent_position_ids", torch.cat(places))
    folder.same(f"{at}in.vit_token_seqlens", [h * w for h, w in pictures.seen])
    order = ascending(batch, Kind.VISION).argsort()
    images = [patchify(g.images, c.vision.patch_size).flatten(0, 1) for g in batch.of(Kind.VISION)]
    folder.close(f"{at}in.packed_vit_tokens", torch.cat(images)[order], tolerance=0.0)
    weight = [s.supervised**-0.5 for q in laid for s in q.segments for _ in range(s.supervised)]
    folder.close(f"{at}in.ce_loss_weights", torch.tensor(weight))
    clean = torch.isinf(folder.get(f"{at}in.packed_timesteps")).nonzero()[:, 0]
    latent = ascending(batch, Kind.CLEAN, Kind.NOISED).sort().values
    folder.same("clean latents", torch.isin(latent, ascending(batch, Kind.CLEAN)).nonzero()[:, 0], clean)

    start = 0
    for d, length in enumerate(batch.lengths):
        p = torch.arange(start, start + length)
        folder.same(f"{at}in.attention_allowed.{d}", rule(batch, p[:, None], p[None]).long())
        start += length
    total = sum(meta["in.flex.sample_lens"])
    padded = pack(laid, made.routes, pad_to=total)
    tail = [total - len(batch)] if total > len(batch) else []
    modes = [("noise" if s.hidden else "full" if s.full else "causal") for q in laid for s in q.segments]
    folder.same("in.flex.sample_lens", [*padded.lengths, *tail], meta["in.flex.sample_lens"])
    folder.same("in.flex.split_lens", [len(s) for q in laid for s in q.segments] + tail, meta["in.flex.split_lens"])
    folder.same("in.flex.attn_modes", modes + ["causal"] * len(tail), meta["in.flex.attn_modes"])
    whole = dense(padded)
    folder.same("in.flex: padding changes no mask", whole[: len(batch), : len(batch)], dense(batch))
    folder.same("in.flex: nothing sees the padding", bool(whole[: len(batch), len(batch) :].any()), False)

    lengths = meta["dropout.sample_lens"]
    dropped = frozenset(q.id for q, n in zip(laid, lengths, strict=True) if len(q) != n)
    shorter = pack(lay_out(folder, made, pictures, dropped), made.routes)
    folder.same("dropout.sample_lens", list(shorter.lengths), lengths)
    index_tensors(folder, shorter, f"{at}dropout.")


def index_tensors(folder: Folder, batch: Batch, at: str) -> None:
    """What both packs record: words, positions, where pictures stand, and what is supervised."""
    text, supervised = ((x != NONE).nonzero()[:, 0] for x in (batch.ids, batch.targets))
    folder.same(f"{at}packed_text_indexes", text)
    folder.same(f"{at}packed_text_ids", batch.ids[text])
    folder.same(f"{at}packed_position_ids", batch.positions)
    folder.same(f"{at}packed_vae_token_indexes", batch.routes[1])
    folder.same(f"{at}packed_vit_token_indexes", ascending(batch, Kind.VISION).sort().values)
    folder.same(f"{at}mse_loss_indexes", ascending(batch, Kind.NOISED).sort().values)
    folder.same(f"{at}ce_loss_indexes", supervised)
    folder.same(f"{at}packed_label_ids", batch.targets[supervised])


def training(folder: Folder) -> None:
    """Latents, every stage of the network, both losses, gradients, and the same losses with padding."""
    made, at = model(folder), "training.out."
    pictures = the_pack(folder, made.config)
    laid = lay_out(folder, made, pictures)
    batch, noise = pack(laid, made.routes), recorded(folder, made, pictures)
    if folder.has("ae"):
        with torch.no_grad():
            images, eps = folder.get("training.in.padded_images"), folder.get("training.in.vae_eps")
            folder.close("training.in.padded_latent", made.autoencoder.encode(images, eps))
    kept: dict[str, list[Tensor]] = {}
    named = {f"layer.{i}": layer for i, layer in enumerate(made.decoder.layers)} | {
        "language_model": made.decoder,
        "vit_model": made.vision,
        "connector": made.projector,
        "time_embedder": made.time,
        "vae2llm": made.latent_in,
        "llm2vae": made.latent_out,
    }

    def keep(name: str) -> Callable:
        return lambda module, inputs, output: kept.setdefault(name, []).append(output.detach())

    handles = [module.register_forward_hook(keep(name)) for name, module in named.items()]
    losses = made.losses(batch, noise)
    for handle in handles:
        handle.remove()
    flat = {name: torch.cat([x.flatten(0, -2) for x in found]) for name, found in kept.items()}

    rank = inverse_permutation(torch.cat(batch.routes))
    for name in (*(f"layer.{i}" for i in range(len(made.decoder.layers))), "language_model"):
        folder.close(at + name, flat[name][rank])
    seen = ascending(batch, Kind.VISION).argsort()
    latent = ascending(batch, Kind.CLEAN, Kind.NOISED).argsort()
    noised = ascending(batch, Kind.NOISED)
    for name in ("vit_model", "connector"):
        folder.close(at + name, flat[name][seen])
    folder.close(f"{at}vae2llm", flat["vae2llm"][latent])
    each = [g.tokens.shape[1] for kind in (Kind.CLEAN, Kind.NOISED) for g in batch.of(kind) for _ in g.tokens]
    folder.close(f"{at}time_embedder", flat["time_embedder"].repeat_interleave(torch.tensor(each), 0)[latent])
    prediction = flat["llm2vae"][noised.argsort()]
    folder.close(f"{at}llm2vae", prediction)
    supervised = (batch.targets != NONE).nonzero()[:, 0]
    logits = made.decoder.logits(flat["language_model"][rank[supervised]]).detach()
    folder.close(f"{at}lm_head", logits)
    folder.close(f"{at}ce_per_token", F.cross_entropy(logits, batch.targets[supervised], reduction="none"))
    z = [latents_to_tokens(s.image[None], made.config.latent_patch)[0] for q in laid for s in q.segments if s.generated]
    eps = [noise.draws[name, "noise0"] for name in pictures.noised]
    t = torch.stack([made.config.times.times[name] for name in pictures.noised])
    parts = prediction.split([len(x) for x in z])
    errors = [squared_error(p, x, e, t[:1], "velocity") for p, x, e in zip(parts, z, eps, strict=True)]
    folder.close(f"{at}mse_per_element", torch.cat(errors))

    text, image = losses["text"], losses["image"]
    folder.same("count of words", text.count, float(len(folder.get("training.in.ce_loss_indexes"))))
    folder.same("count of latent tokens", image.count, float(len(folder.get("training.in.mse_loss_indexes"))))
    means = text.sum / text.count, image.sum / image.count
    total = LOSS * means[0] + means[1]
    folder.close(f"{at}loss_ce_mse_total", torch.stack([*means, total]))
    total.backward()
    gradients = export(BAGEL, {k: p.grad for k, p in made.named_parameters() if p.grad is not None})
    for name in folder.names("training.grad."):
        folder.close(name, gradients[name.removeprefix("training.grad.")])
    norms = folder.meta["training"]["out.grad_norms"]
    folder.same("parameters with gradients", sorted(gradients), sorted(norms))
    for name, norm in norms.items():
        folder.close(f"norm of grad.{name}", gradients[name].norm(), norm)
    every = export(BAGEL, {k: v for k, v in made.state_dict().items() if not k.startswith("autoencoder.")})
    without = folder.meta["training"]["out.parameters_without_grad"]
    folder.same("parameters without gradients", sorted(every.keys() - gradients.keys()), sorted(without))

    padded = pack(laid, made.routes, pad_to=sum(folder.meta["training"]["in.flex.sample_lens"]))
    with torch.no_grad():
        again = made.losses(padded, noise)
    ours = torch.stack([again[k].sum / again[k].count for k in ("text", "image")])
    folder.close("losses of the padded pack", ours, folder.get(f"{at}loss_ce_mse_total")[:2])


def optimiser(folder: Folder) -> None:
    """Both losses before each of the recorded steps of AdamW."""
    made, name = model(folder), "training.out.adamw_trajectory_ce_mse"
    pictures = the_pack(folder, made.config)
    batch = pack(lay_out(folder, made, pictures), made.routes)
    noise = recorded(folder, made, pictures)
    trained = [p for n, p in made.named_parameters() if not n.startswith("autoencoder.")]
    adam = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    seen = []
    for _ in range(len(folder.get(name))):
        losses = made.losses(batch, noise)
        text, image = (losses[k].sum / losses[k].count for k in ("text", "image"))
        seen.append(torch.stack([text, image]).detach())
        adam.zero_grad()
        (LOSS * text + image).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
    folder.close(name, torch.stack(seen), tolerance=TRACK)


# ---- reading ----------------------------------------------------------------------------------------------------


def with_images(laid: Layout, images: dict[Kind, Tensor], made: Bagel, encoded: bool = False) -> Layout:
    """The layout of blank pictures with recorded ones in their place, of whatever shape; CLEAN may hold latents."""
    c = made.config

    def fill(s: Segment) -> Segment:
        if s.kind not in images:
            return s
        image, latents = images[s.kind], encoded and s.kind == Kind.CLEAN
        stride = c.vision.patch_size if s.kind == Kind.VISION else c.latent_patch if latents else c.stride
        grid = (image.shape[-2] // stride, image.shape[-1] // stride)
        ids = (s.ids[0], *[NONE] * grid[0] * grid[1], s.ids[-1])
        return replace(s, image=image, grid=grid, ids=ids, encoded=latents)

    blanks = (replace(s, image=None, grid=None) if s.kind in images else s for s in laid.segments)
    return replace(laid, segments=tuple(map(fill, blanks)))


def parts(laid: Layout) -> list[Layout]:
    """The segments as sequences of their own, to be read one after another as the published code does."""
    return [Layout(laid.id, (s,)) for s in laid.segments]


def check_cache(folder: Folder, context: Context, name: str) -> None:
    """Keys and values of every recorded layer."""
    for key in folder.names(f"{name}."):
        what, layer = key.split(".")[-2:]
        folder.close(key, context.cache.buffer[int(layer), "kv".index(what), : context.length])


def beside(lengths: list[int], new: int | list[int]) -> tuple[list[int], list[int]]:
    """Where kept tokens and new ones stand when contexts and what they read are laid out one after another."""
    kept, fresh, at = [], [], 0
    for i, n in enumerate(lengths):
        m = new if isinstance(new, int) else new[i]
        kept += range(at, at + n)
        fresh += range(at + n, at + n + m)
        at += n + m
    return kept, fresh


def check_words(folder: Folder, at: str, contexts: list[Context], laid: list[Layout]) -> None:
    """The published index tensors of words that are read after these contexts."""
    lengths = [c.length for c in contexts]
    kept, fresh = beside(lengths, [len(q) for q in laid])
    folder.same(f"{at}.packed_text_ids", [i for q in laid for s in q.segments for i in s.ids])
    positions = [p for c, q in zip(contexts, laid, strict=True) for p in q.positions(c.position)]
    folder.same(f"{at}.packed_text_position_ids", positions)
    folder.same(f"{at}.packed_text_indexes", fresh)
    folder.same(f"{at}.packed_key_value_indexes", kept)
    folder.same(f"{at}.key_values_lens", lengths)
    folder.same(f"{at}.text_token_lens", [len(q) for q in laid])


def check_picture(folder: Folder, at: str, made: Bagel, context: Context, laid: Layout) -> None:
    """The published index tensors of one picture that is read after this context."""
    c, [s] = made.config, laid.segments
    kept, fresh = beside([context.length], len(s))
    what = "vit" if s.kind == Kind.VISION else "vae"
    side = c.seen_side if s.kind == Kind.VISION else c.latent_side
    tokens = [i for i, token in enumerate(s.ids) if token == NONE]
    folder.same(f"{at}.packed_text_ids", [i for i in s.ids if i != NONE])
    folder.same(f"{at}.packed_text_indexes", [i for i, token in enumerate(s.ids) if token != NONE])
    folder.same(f"{at}.packed_{what}_token_indexes", tokens)
    folder.same(f"{at}.packed_{what}_position_ids", grid_places(s.grid, side, stretch=c.stretch))
    folder.same(f"{at}.packed_position_ids", laid.positions(context.position))
    folder.same(f"{at}.packed_seqlens", [len(s)])
    folder.same(f"{at}.packed_indexes", fresh)
    folder.same(f"{at}.packed_key_value_indexes", kept)
    folder.same(f"{at}.key_values_lens", [context.length])
    if what == "vit":
        folder.same(f"{at}.vit_token_seqlens", [len(tokens)])
        patches = patchify(s.image[None], c.vision.patch_size)[0]
        folder.close(f"{at}.packed_vit_tokens", patches, tolerance=0.0)


def question(folder: Folder, made: Bagel) -> Layout:
    """The picture and the question that the folder records, laid out."""
    image = folder.get("understanding.in.image")
    sample = Sample("ask", (user(Image(blank(*image.shape[-2:])), words(folder, "question")),))
    return with_images(made.lay_out(sample), {Kind.VISION: image}, made)


def understanding(folder: Folder) -> None:
    """A picture and a question read in two calls and in one, then greedy words from the cache."""
    made, at = model(folder), "understanding."
    laid = question(folder, made)
    picture, text = parts(laid)
    opened = made.open()
    check_picture(folder, f"{at}in.vit", made, opened, picture)
    [seen] = made.extend([opened], [picture])
    check_cache(folder, seen, f"{at}out.cache_after_image")
    check_words(folder, f"{at}in.text", [seen], [text])
    [context] = made.extend([seen], [text])
    check_cache(folder, context, f"{at}out.cache_after_text")
    [joint] = made.extend([made.open()], [laid])
    check_cache(folder, joint, f"{at}out.cache_after_text")
    both = folder.meta["understanding"]["out.kv_and_rope_after_prefill"]
    folder.same("length and position after reading", [[context.length], [context.position]], both)
    folder.same(f"{at}in.start.key_values_lens", [context.length])
    folder.same(f"{at}in.start.packed_key_value_indexes", list(range(context.length)))
    folder.same(f"{at}in.start.packed_query_position_ids", [context.position])
    said, rows = [made.markers["bos"]], []
    folder.same(f"{at}in.start.packed_start_tokens", said[:])
    for _ in range(len(folder.get(f"{at}out.step_logits"))):
        [joint] = made.extend([joint], [made.reply(said[-1:])])
        rows.append(joint.logits)
        said.append(int(joint.logits.argmax()))
    folder.same(f"{at}out.tokens", torch.tensor(said[:-1])[:, None])
    folder.close(f"{at}out.step_logits", torch.stack(rows))


# ---- drawing ----------------------------------------------------------------------------------------------------


def settings(args: dict) -> Settings:
    """``num_timesteps`` counts the ends, so it is one more than our steps."""
    return Settings(
        args["num_timesteps"] - 1,
        guidance_scale=args.get("cfg_text_scale", 1.0),
        image_guidance_scale=args.get("cfg_img_scale", 1.0),
        guidance_interval=tuple(args.get("cfg_interval", (0.0, 1.0))),
        timestep_shift=args["timestep_shift"],
        renorm=args.get("cfg_renorm_type", "global"),
        renorm_min=args.get("cfg_renorm_min", 0.0),
    )


def check_drawing(
    folder: Folder, made: Bagel, at: str, group: str, contexts: list[tuple[Context, ...]], branches: int = 1
) -> None:
    """Index tensors, times, states, velocities and final tokens of one group, one picture for each entry of
    ``contexts`` (full, without text, without pictures), of which guidance takes the first ``branches``."""
    c, given = made.config, f"{at}.in.{group}"
    chosen = settings(folder.meta[at][f"in.{group}.args"])
    noise = folder.get(f"{given}.packed_init_noises")
    starts = noise.unflatten(0, (len(contexts), -1))
    n = starts.shape[1]
    grid = grid_of(folder.get(f"{given}.packed_vae_position_ids")[:n], c.latent_side)
    canvas = (grid[0] * c.stride, grid[1] * c.stride)
    shown = [Image(PIL.Image.new("RGB", (1, 1)), "condition")] if branches > 2 else []
    sample = Sample("draw", (user(*shown, "1"), assistant(Image(None, "target", (canvas[1], canvas[0])))))
    folder.same(f"{given}: canvas", list(made.canvas(sample)), list(canvas))

    whole = [x[0] for x in contexts]
    kept, fresh = beside([x.length for x in whole], n + 2)
    begins = [i * (n + 2) for i in range(len(contexts))]
    ends = [made.markers["image"], made.markers["end"]]
    folder.same(f"{given}.packed_text_ids", ends * len(contexts))
    folder.same(f"{given}.packed_text_indexes", [b + i for b in begins for i in (0, n + 1)])
    folder.same(f"{given}.packed_vae_token_indexes", [b + 1 + i for b in begins for i in range(n)])
    places = grid_places(grid, c.latent_side, stretch=c.stretch).tolist()
    folder.same(f"{given}.packed_vae_position_ids", places * len(contexts))
    folder.same(f"{given}.packed_position_ids", [x.position for x in whole for _ in range(n + 2)])
    folder.same(f"{given}.packed_seqlens", [n + 2] * len(contexts))
    folder.same(f"{given}.packed_indexes", fresh)
    folder.same(f"{given}.packed_key_value_indexes", kept)
    folder.same(f"{given}.key_values_lens", [x.length for x in whole])
    for b, branch in enumerate(("cfg_text", "cfg_img"), start=1):
        if folder.names(f"{given}.{branch}."):
            other = [x[b] for x in contexts]
            kept, fresh = beside([x.length for x in other], n + 2)
            name = f"{given}.{branch}.cfg"
            folder.same(f"{name}_key_values_lens", [x.length for x in other])
            folder.same(f"{name}_packed_key_value_indexes", kept)
            folder.same(f"{name}_packed_query_indexes", fresh)
            folder.same(f"{name}_packed_position_ids", [x.position for x in other for _ in range(n + 2)])

    count = len(contexts)
    guided = [x[:branches] for x in contexts]
    chosen = replace(chosen, guidance_scale=1.0) if branches == 1 else chosen
    drawings = made.start(guided, [sample] * count, [chosen] * count, [0] * count)
    drawings = [replace(d, state=x) for d, x in zip(drawings, starts, strict=True)]
    times, states, velocities = [], [], []
    while not drawings[0].done:
        times.append(drawings[0].times[drawings[0].step])
        states.append(torch.cat([d.state for d in drawings]))
        drawings = made.step(drawings)
        velocities.append(torch.cat([d.velocity for d in drawings]))
    out = f"{at}.out.{group}"
    folder.close(f"{out}.t", torch.stack(times), tolerance=1e-6)
    folder.close(f"{out}.x_t", torch.stack(states))
    folder.close(f"{out}.velocity", torch.stack(velocities))
    for i, d in enumerate(drawings):
        folder.close(f"{out}.latent.{i}", d.state)
    name = f"{out}.decoded"
    if name in folder.tensors and folder.has("ae"):
        latents = tokens_to_latents(torch.stack([d.state for d in drawings]), grid, c.latent_patch)
        with torch.no_grad():
            folder.close(name, made.autoencoder.decode(latents))
        folder.close(f"{name}, clamped", made.finish(drawings), folder.get(name).clamp(-1, 1))


def groups(folder: Folder, stage: str) -> list[str]:
    """The ways of drawing that a stage records."""
    return [m[1] for key in folder.meta[stage] if (m := re.fullmatch(r"in\.(\w+)\.args", key))]


def generation(folder: Folder) -> None:
    """A prompt read and drawn in every recorded way; two prompts at once where there is a pair."""
    made, at = model(folder), "generation"

    def read(names: list[str], given: str) -> list[Context]:
        laid = [made.lay_out(Sample(n, (user(words(folder, n)),))) for n in names]
        opened = [made.open() for _ in names]
        check_words(folder, f"{at}.in.{given}", opened, laid)
        return made.extend(opened, laid)

    [context] = read(["caption"], "text")
    check_cache(folder, context, f"{at}.out.text_cache")
    for group in groups(folder, at):
        if folder.has(f"{at}.in.{group}_text.packed_text_ids"):
            check_drawing(folder, made, at, group, [(c,) for c in read(["caption", "short"], f"{group}_text")])
            continue
        request = Sample("draw", (user("1"), assistant(Image(None, "target"))))
        branches = len(made.branches(request, settings(folder.meta[at][f"in.{group}.args"])))
        check_drawing(folder, made, at, group, [(context, made.open())], branches)


def editing(folder: Folder) -> None:
    """A picture and an instruction read part by part and at once; drawn with text and image guidance together."""
    made, at = model(folder), "editing"
    pixels = folder.get(f"{at}.in.vae_image")
    if folder.has("ae"):
        with torch.no_grad():
            latents = made.autoencoder.encode(pixels[None], folder.get(f"{at}.in.vae_eps"))[0]
        if folder.has("latents"):
            folder.close("latents.editing", latents)
    else:
        latents = folder.get("latents.editing")
    folder.close(f"{at}.in.vae.padded_images", pixels[None], tolerance=0.0)
    folder.same(f"{at}.in.vae.packed_timesteps", [0])
    grid = [s // made.config.latent_patch for s in latents.shape[-2:]]
    folder.same("in.vae.patchified_vae_latent_shapes", [grid], folder.meta[at]["in.vae.patchified_vae_latent_shapes"])
    images = {Kind.CLEAN: latents, Kind.VISION: folder.get(f"{at}.in.vit_image")}
    source = Image(blank(*pixels.shape[-2:]), "condition")
    request = Sample("edit", (user(source, words(folder, "edit")), assistant(Image(None, "target"))))
    folder.same("canvas of an edit", list(made.canvas(request)), list(pixels.shape[-2:]))

    context = made.open()
    clean, seen, text = parts(with_images(made.lay_out(request), images, made, encoded=True))
    for name, laid in (("vae", clean), ("vit", seen)):
        check_picture(folder, f"{at}.in.{name}", made, context, laid)
        [context] = made.extend([context], [laid])
        if name == "vae":
            check_cache(folder, context, f"{at}.out.cache_after_vae")
    check_words(folder, f"{at}.in.text", [context], [text])
    [context] = made.extend([context], [text])
    check_cache(folder, context, f"{at}.out.cache_full")
    for group in groups(folder, at):
        branches = made.branches(request, settings(folder.meta[at][f"in.{group}.args"]))
        folder.same(f"{group}: branches", tuple(branches), (NOTHING, TEXT, IMAGE)[: len(branches)])
        drops = (NOTHING, TEXT, IMAGE)
        laid = [with_images(made.lay_out(request, drop), images, made, encoded=True) for drop in drops]
        contexts = made.extend([made.open() for _ in laid], laid)
        check_cache(folder, contexts[0], f"{at}.out.cache_full")
        expected = folder.meta[at]["out.kv_rope.full_imageonly_textonly"]
        folder.same(f"{group}: lengths and positions", [[[c.length], [c.position]] for c in contexts], expected)
        check_drawing(folder, made, at, group, [tuple(contexts)], len(branches))


def probes(folder: Folder) -> None:
    """Attention as computed, and what the released probes compute instead, when reading and when drawing."""
    made, meta = model(folder), folder.meta["probes"]
    laid, seen = question(folder, made), []
    picture, asked = (len(s) for s in laid.segments)
    rows = torch.arange(picture, picture + asked)
    collect.read(made, laid, lambda i, call: seen.append(call.weights(0, rows)))
    outputs: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda _, __, x: outputs.append(x)) for m in made.decoder.layers]
    made.extend([made.open()], [laid])
    for hook in hooks:
        hook.remove()
    released = published.published_weights(made, laid)
    for i, (actual, theirs, output) in enumerate(zip(seen, released, outputs, strict=True)):
        folder.close(f"probes.und.actual_attention.{i}", actual)
        folder.close(f"probes.und.released_probe.{i}", theirs)
        folder.close(f"probes.und.layer_output.{i}", output)
    average = torch.stack([w[:, [-4, -3], :picture].sum(-1).mean() for w in seen])
    name = "und.avg_text_to_vision"
    folder.close(f"{name}.actual", average, torch.tensor(meta[f"{name}.actual_same_rows"]))
    folder.close(f"{name}.released", published.published_attention(made, laid), torch.tensor(meta[f"{name}.released"]))

    [context] = made.extend([made.open()], [made.lay_out(Sample("caption", (user(words(folder, "caption")),)))])
    grid = grid_of(folder.get("generation.in.plain.packed_vae_position_ids"), made.config.latent_side)
    size = (grid[1] * made.config.stride, grid[0] * made.config.stride)
    asked = Sample("draw", (user("1"), assistant(Image(None, "target", size))))
    [drawing] = made.start([(context,)], [asked], [Settings(2, guidance_scale=1.0, timestep_shift=3.0)], [0])
    noise = folder.get("generation.in.plain.packed_init_noises")
    watched = read_on = replace(drawing, state=noise)
    for step, shares in enumerate(meta["gen.released_share_percent"].values()):
        found: list[Tensor] = []
        watched = collect.step(made, watched, lambda i, call, found=found: found.append(call.weights()))
        read_on, ours = published.published_keywords(made, read_on, meta["gen.keywords"])
        for i, weights_of in enumerate(found):
            folder.close(f"probes.gen.actual_attention.step{step}.{i}", weights_of)
            theirs = torch.tensor(list(shares[str(i)].values()))
            folder.close(f"gen.share.step{step}.{i}", torch.tensor([ours[n][i] for n in shares[str(i)]]), theirs)


STAGES: dict[str, Callable[[Folder], None]] = {
    "weights": both_ways,
    "components": components,
    "layout": layout,
    "training": training,
    "optimiser": optimiser,
    "understanding": understanding,
    "generation": generation,
    "editing": editing,
    "probes": probes,
}
"""Every stage in order."""
