"""Cheers against numbers of the published code, stage by stage; nothing here knows the sizes of one folder.

The recorded rows are padded; ours are compared where a row has tokens. The published code counts time from noise to
data and predicts data - noise, so times are turned round and velocities change sign here and nowhere else. Without the
weights of ``vae_model`` the autoencoder is left out, and ``latents.safetensors`` gives the pictures encoded with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from diptych.core.batch import Batch, pack
from diptych.core.layout import Kind, Layout, Segment
from diptych.core.mask import dense
from diptych.core.noise import Noise
from diptych.core.tensors import NONE, Tensor
from diptych.models.cheers import Cheers, Config, Settings
from diptych.models.protocol import NOTHING, Context, Drop
from diptych.models.published.cheers import cheers, published_config
from diptych.models.published.key_map import export, load
from diptych.parts.attention import Fixed, documents
from diptych.parts.flow import TimeDraw
from diptych.parts.tokenizer import Tokenizer
from tests.parity.compare import Folder

READ, DRAW = -200, -300
TEXT = frozenset({"text"})
WEIGHTS = ("weights",)
QUIRKS = (
    "repeated_positions",
    "structural_labels",
    "visible_noise",
    "loss_on_all_pictures",
    "dummy_picture",
    "endpoint_step",
)


class Ids(Tokenizer):
    """The markers are the folder's; texts do not occur."""

    def __init__(self, special: dict[str, int]) -> None:
        self.markers = {
            "<|im_start|>": 0,
            "<|im_end|>": special["EOS_TOKEN_ID"],
            "<im_start>": special["IM_START_ID"],
            "<im_end>": special["IM_END_ID"],
            "<no_mean>": special["NO_MEAN_ID"],
        }

    def adding(self, tokens) -> Ids:
        return self

    def __len__(self) -> int:
        return 0

    def encode(self, text: str) -> list[int]:
        return []

    def id(self, token: str) -> int:
        return self.markers[token]


@cache
def weights(path: Path) -> dict[str, Tensor]:
    """All published tensors that a folder has."""
    found = sorted(path.glob("weights*.safetensors"))
    return {name: tensor for file in found for name, tensor in load_file(file).items()}


def config(folder: Folder) -> Config:
    """The folder's sizes, with everything that the published code does."""
    return replace(
        published_config({"config.json": folder.config}, {"model": weights(folder.path)}), published_quirks=QUIRKS
    )


def whole(folder: Folder) -> bool:
    """Whether the autoencoder is there."""
    return any(name.startswith("model.vae_model.") for name in weights(folder.path))


def model(folder: Folder) -> Cheers:
    """The folder's model in float32; its autoencoder is left as it is where the folder has none."""
    c = config(folder)
    made = Cheers(c, Ids(folder.meta["token_ids"]))
    own = made.state_dict()
    expected = {n: t for n, t in own.items() if whole(folder) or not n.startswith("autoencoder.")}
    made.load_state_dict(load(cheers(c.vision.patch_size), weights(folder.path), expected), strict=False)
    return made.eval()


def both_ways(folder: Folder) -> None:
    """Every published tensor comes back from our names unchanged, the language head that repeats the embedding too."""
    made, theirs = model(folder), weights(folder.path)
    state = {n: t for n, t in made.state_dict().items() if whole(folder) or not n.startswith("autoencoder.")}
    back = export(cheers(made.config.vision.patch_size), state)
    folder.same("weights: names", sorted(back), sorted(theirs))
    folder.same("weights: values", [n for n in theirs if not torch.equal(back[n], theirs[n].to(back[n].dtype))], [])


# ---- rows -------------------------------------------------------------------------------------------------------


def images(folder: Folder, stage: str) -> list[Tensor]:
    """The pictures of a stage in [-1, 1], or their latents where the autoencoder is not there; -1 is a black one."""
    latent = not whole(folder)
    known = folder.get("latents.images" if latent else "inputs.images")
    black = folder.get("latents.black") if latent else torch.zeros_like(known[0])
    found = [known[i] if i >= 0 else black for i in folder.meta["cases"][stage]["images"]]
    return found if latent else [2 * x - 1 for x in found]


def picture(folder: Folder, made: Cheers, kind: Kind, image: Tensor, **how) -> Segment:
    """A picture (or its latents) as a segment."""
    stride = made.config.merge if len(image) != 3 else made.config.stride
    grid = (image.shape[-2] // stride, image.shape[-1] // stride)
    ids = (NONE,) * (grid[0] * grid[1])
    return Segment(kind, ids, image=image, grid=grid, encoded=len(image) != 3, **{"full": True} | how)


def lay_out(
    folder: Folder,
    made: Cheers,
    name: str,
    ids: list[int],
    pictures: Iterator[Tensor],
    labels: list[int] | None = None,
    drop: Drop = NOTHING,
    source: Kind = Kind.VISION,
) -> Layout:
    """A recorded row as ours: words as they are, pictures in their slots; a row without slots follows a dummy."""
    if READ not in ids and DRAW not in ids:
        kind = Kind.NOISED if labels else Kind.VISION
        segments = [picture(folder, made, kind, next(pictures), full=False)]
    else:
        segments = []
    run: list[int] = []
    labels = labels or [-100] * len(ids)

    def words(at: int) -> None:
        if run:
            targets = (*(NONE if x < 0 else x for x in labels[at - len(run) + 1 : at]), NONE)
            segments.append(replace(made.reply(run, drop).segments[0], targets=targets))
            run.clear()

    for at, i in enumerate(ids):
        if i not in (READ, DRAW):
            run.append(i)
            continue
        words(at)
        kind = source if i == READ else Kind.NOISED
        segments.append(picture(folder, made, kind, next(pictures), generated=i == DRAW))
    words(len(ids))
    return Layout(name, tuple(segments))


def rows(folder: Folder, made: Cheers, stage: str, **how) -> list[Layout]:
    """The rows of a stage without their padding."""
    ids = folder.get(f"{stage}.input_ids")
    name = f"{stage}.attention_mask"
    mask = folder.get(name) if folder.has(name) else torch.ones_like(ids)
    labels = folder.get(f"{stage}.labels") if folder.has(f"{stage}.labels") else None
    pictures = iter(images(folder, stage))
    return [
        lay_out(
            folder,
            made,
            f"{stage}/{i}",
            row[m > 0].tolist(),
            pictures,
            None if labels is None else labels[i][m > 0].tolist(),
            **how,
        )
        for i, (row, m) in enumerate(zip(ids, mask, strict=True))
    ]


@contextmanager
def watched(**modules: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """The outputs of modules by name; several calls are joined along the first axis."""
    kept: dict[str, list[Tensor]] = {}
    out: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        return lambda module, inputs, output: kept.setdefault(name, []).append(output.detach())

    hooks = [m.register_forward_hook(keep(name)) for name, m in modules.items()]
    yield out
    for hook in hooks:
        hook.remove()
    out |= {name: torch.cat(found) for name, found in kept.items()}


def inside(made: Cheers) -> dict[str, torch.nn.Module]:
    """The modules whose outputs are recorded."""
    embedded = torch.nn.Identity()  # what the first layer of the vision encoder takes
    made.vision.layers[0].register_forward_pre_hook(lambda module, inputs: (embedded(inputs[0]),))
    return {
        "pixel_hat": made.pixel_decoder.decoder,
        "embeddings": embedded,
        "layer0": made.vision.layers[0],
        "siglip": made.vision.post_layernorm,
        "semantic": made.projector,
        "llm_layer0": made.decoder.layers[0],
        "llm": made.decoder,
    }


def forward(made: Cheers, batch: Batch) -> tuple[Tensor, Tensor]:
    """Embedded row and final states of rows that are only read."""
    pictures = [(g.tokens, made._see(made._latents(g))[0]) for g in batch.pictures]
    embedded = made.decoder.embed(batch, pictures)
    return embedded, made.decoder(embedded, batch.positions, documents(batch))


def valid(batch: Batch, recorded: Tensor, lengths: list[int] | None = None) -> Tensor:
    """The tokens of recorded, padded rows, (B, L, ...), one after another."""
    return torch.cat([row[:n] for row, n in zip(recorded, lengths or batch.lengths, strict=True)])


# ---- parts and reading ------------------------------------------------------------------------------------------


@torch.no_grad()
def blocks(folder: Folder) -> None:
    """The autoencoder, times, the pooling head, the projector and both stages of the head, each alone."""
    made, at = model(folder), "blocks."
    if whole(folder):
        pixels, coder = folder.get("inputs.images")[folder.meta["cases"]["blocks"]["images"]], made.autoencoder
        folder.close(f"{at}vae_moments", coder.moments(pixels))
        folder.close(f"{at}vae_latent", coder.encode(pixels))
        folder.close(f"{at}vae_decoded_sample0", coder.decode(coder.encode(pixels))[:1])
    t = folder.get(f"{at}t")
    folder.close(f"{at}time_embed_text", made.coarse.time(t[:, 0])[:, None])
    folder.close(f"{at}time_embed_vision", made.fine.time(t[:, 0])[:, None])
    if whole(folder):
        decoded = coder.decode(coder.encode(pixels))
        grid = tuple(side // made.config.vision.patch_size for side in decoded.shape[-2:])
        features = made.vision.features(made.vision.embed(decoded, made.vision.resized(grid)))
        folder.close(f"{at}siglip_pooled", made.vision.head(features))
    side = round(folder.get(f"{at}und_out").shape[1] ** 0.5)
    folder.close(f"{at}und_out", made.projector(folder.get(f"{at}und_in"), (side, side)))
    t, x = folder.get(f"{at}block_t")[:, 0], folder.get(f"{at}gen_in")
    folder.close(f"{at}gen_out", made.coarse(x, t, torch.arange(x.shape[1])))
    x = folder.get(f"{at}hi_in")
    folder.close(f"{at}hi_out", made.fine(x, t, torch.arange(x.shape[1]) % (x.shape[1] // 2)))


@torch.no_grad()
def understanding(folder: Folder) -> None:
    """Rows of unequal length in one packed row and through the cache, every stage of the tokenizer, the mask, and
    greedy words."""
    made, at = model(folder), "understanding."
    laid = rows(folder, made, "understanding")
    batch = pack(laid)
    with watched(**inside(made)) as seen:
        embedded, states = forward(made, batch)
    for name, ours in (
        ("pixel_hat", "pixel_hat"),
        ("siglip_embeddings", "embeddings"),
        ("siglip_layer0", "layer0"),
        ("siglip_last", "siglip"),
        ("semantic_tokens", "semantic"),
    ):
        folder.close(at + name, seen[ours])
    recorded = {
        n: folder.get(at + n) for n in ("inputs_embeds", "llm_layer0", "llm_last", "logits", "image_token_mask")
    }
    folder.close(f"{at}inputs_embeds", embedded, valid(batch, recorded["inputs_embeds"]))
    folder.close(f"{at}llm_layer0", seen["llm_layer0"], valid(batch, recorded["llm_layer0"]))
    folder.close(f"{at}llm_last", states, valid(batch, recorded["llm_last"]))
    folder.close(f"{at}logits", made.decoder.logits(states), valid(batch, recorded["logits"]))
    folder.same(f"{at}image_token_mask", (batch.ids == NONE).long(), valid(batch, recorded["image_token_mask"]))
    mask, start = dense(batch).long(), 0
    for i, n in enumerate(batch.lengths):
        allowed = folder.get(f"{at}llm_mask")[i, :n, :n]
        folder.same(f"{at}llm_mask.{i}", mask[start : start + n, start : start + n], allowed)
        start += n
    contexts = made.extend([made.open() for _ in laid], laid)
    last = torch.stack([row[n - 1] for row, n in zip(recorded["logits"], batch.lengths, strict=True)])
    folder.close(f"{at}logits from the cache", torch.stack([c.logits for c in contexts]), last)
    case = folder.meta["cases"]["understanding"]
    for i, ids in enumerate(case["greedy_ids"]):
        folder.same(f"{at}greedy_ids.{i}", say(made, contexts[i], len(ids)), ids)


def say(made: Cheers, context: Context, n: int) -> list[int]:
    """Greedy words until the end of a turn, ``n`` at most."""
    said: list[int] = []
    while len(said) < n:
        said.append(int(context.logits.argmax()))
        if said[-1] in made.stop_ids:
            break
        [context] = made.extend([context], [made.reply(said[-1:])])
    return said


@torch.no_grad()
def text_only(folder: Folder) -> None:
    """A row without a picture, behind the dummy."""
    made, at = model(folder), "text_only."
    batch = pack(rows(folder, made, "text_only"))
    logits = made.decoder.logits(forward(made, batch)[1])
    folder.close(f"{at}logits", logits, valid(batch, folder.get(f"{at}logits")))
    folder.same(f"{at}image_token_mask", batch.full.long(), valid(batch, folder.get(f"{at}image_token_mask")))


# ---- drawing ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def velocity(folder: Folder) -> None:
    """One evaluation of the velocity with everything inside it."""
    made, at = model(folder), "velocity."
    laid = rows(folder, made, "velocity")
    with watched(llm=made.decoder) as read:
        contexts = made.extend([made.open() for _ in laid], laid)
    batch = pack(laid)
    folder.close(f"{at}prefix_last_hidden", read["llm"], valid(batch, folder.get(f"{at}prefix_last_hidden")))
    x, t = folder.get(f"{at}x_t"), folder.get(f"{at}t")
    n = x.shape[-1] * x.shape[-2] // made.config.merge**2
    inner = inside(made) | {
        "gen_block0": made.coarse.layers[0],
        "gen_block6": made.coarse.layers[-1],
        "gen_out": made.coarse,
        "gate": made.gate.gate,
        "hi_gate_out": made.gate,
        "hi_block0": made.fine.layers[0],
    }
    with watched(**inner) as seen:
        v = made._velocity(x, (1 - t).expand(len(x)), Fixed(contexts, n), 1)[0]
    folder.close(f"{at}pixel_hat_sample0", seen["pixel_hat"][:1])
    folder.close(f"{at}siglip_last", seen["siglip"])
    folder.close(f"{at}semantic_tokens", seen["semantic"])
    folder.close(f"{at}llm_image_hidden", seen["llm"].unflatten(0, (len(x), n)))
    folder.close(f"{at}detail_tokens", seen["embeddings"])
    for name in ("gen_block0", "gen_block6", "gen_out", "gate", "hi_gate_out", "hi_block0"):
        folder.close(at + name, seen[name])
    folder.close(f"{at}heat_map_sample0", seen["gate"][0].view(x.shape[-2:]))
    folder.close(f"{at}velocity", -v)


@torch.no_grad()
def drawing(folder: Folder, stage: str) -> None:
    """A whole sampling loop: schedule, states, the velocity of every branch, the last latents, and the words that
    follow the picture as it stood before its last step."""
    made, case, at = model(folder), folder.meta["cases"][stage], f"{stage}."
    source = Kind.CLEAN if case.get("edit_image") else Kind.VISION
    drops = (NOTHING, TEXT) if case["cfg_scale"] != 1 else (NOTHING,)
    branches = []
    for drop in drops:
        laid = rows(folder, made, stage, drop=drop, source=source)
        branches.append(made.extend([made.open() for _ in laid], laid))
    z0 = folder.get(f"{at}z0")
    settings = Settings(
        case["num_inference_steps"],
        guidance_scale=case["cfg_scale"],
        guidance_interval=(0.0, 1.0),
        timestep_shift=1 / case["alpha"],
        renorm="none",
        source_share=0.1 if case.get("edit_image") else 0.0,
    )
    factor = made.config.autoencoder.downsample
    canvas = (z0.shape[-2] * factor, z0.shape[-1] * factor)
    scales = dict(zip(drops, (1.0, case["cfg_scale"]), strict=False))
    origins = [c.private[-1][1] if c.private else None for c in branches[0]]
    drawings = [
        made.begin(z, tuple(b[i] for b in branches), scales, canvas, settings, origins[i]) for i, z in enumerate(z0)
    ]
    kept = []
    original = made._velocity
    made._velocity = lambda *args: kept.append(original(*args)) or kept[-1]
    states = []
    while not drawings[0].done:
        states.append(made._grid(torch.stack([d.state for d in drawings]), canvas))
        drawings = made.step(drawings)
    folder.close(f"{at}t_schedule", 1 - drawings[0].times[:-1], tolerance=1e-6)
    folder.close(f"{at}x_trajectory", torch.stack(states))
    for b, name in enumerate(("v_cond", "v_uncond")[: len(drops)]):
        folder.close(at + name, -torch.stack([v[b] for v in kept]))
    final = made._grid(torch.stack([d.state for d in drawings]), canvas)
    folder.close(f"{at}final_latent", final)
    if folder.has(f"{at}image_sample0") and whole(folder):
        decoded = made.autoencoder.decode(final[:1])
        folder.close(f"{at}image_sample0", decoded)
        folder.close("finished picture", (made.finish(drawings)[:1] + 1) / 2, decoded.clamp(0, 1))
    lengths = [branches[0][0].length] * len(states)
    folder.same(f"{at}kv_before", lengths, case["kv_before"])
    last = [picture(folder, made, Kind.VISION, z) for z in states[-1]]
    contexts = made.extend(branches[0], [Layout("drawn", (s,)) for s in last])
    folder.same(f"{at}kv_after", [contexts[0].length] * len(states), case["kv_after"])
    end = made.markers["end"]
    contexts = made.extend(contexts, [made.reply([end]) for _ in contexts])
    for i, ids in enumerate(case["generated_ids"]):
        folder.same(f"{at}generated_ids.{i}", [end, *say(made, contexts[i], len(ids) - 1)], ids)


# ---- training ---------------------------------------------------------------------------------------------------


class Recorded(Noise):
    """The recorded noise of each picture."""

    def __init__(self, draws: dict[tuple[str, str], Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "draws", draws)

    def normal(self, sample, name, shape):
        found = self.draws[sample, name]
        assert tuple(found.shape) == tuple(shape)
        return found


class RecordedTimes(TimeDraw):
    """The recorded times, turned round."""

    def __init__(self, times: dict[tuple[str, int], Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "times", times)

    def __call__(self, noise, owners, ordinals):
        return torch.stack([1 - self.times[key] for key in zip(owners, ordinals, strict=True)])


def training(folder: Folder, stage: str) -> None:
    """Both losses, what they are made of, and every gradient."""
    made, at = model(folder), f"{stage}."
    laid = rows(folder, made, stage)
    noise, times, numbers = folder.get(f"{at}noise"), folder.get(f"{at}t"), iter(range(1000))
    draws, clock = {}, {}
    for q in laid:
        ordinals: dict[Kind, int] = {}
        for s in q.segments:
            if s.image is not None:
                i, ordinal = next(numbers), ordinals.get(s.kind, 0)
                ordinals[s.kind] = ordinal + 1
                if s.kind == Kind.NOISED:
                    draws[q.id, f"noise{ordinal}"], clock[q.id, ordinal] = noise[i], times[i]
    made.config = replace(made.config, times=RecordedTimes(clock))
    batch = pack(laid)
    order = torch.cat([g.tokens[:, 0] for g in batch.pictures]).argsort()  # from our groups to the order of pictures
    predictions, targets = [], []
    predict = made._predict

    def kept(hidden, detail, t, z):
        predictions.append(out := predict(hidden, detail, t, z))
        return out

    made._predict = kept
    with watched(llm=made.decoder, semantic=made.projector) as seen:
        losses = made.losses(batch, Recorded(draws))
    hidden = folder.get(f"{at}hidden_states")
    folder.close(f"{at}semantic_tokens", seen["semantic"][order])
    folder.close(f"{at}hidden_states", seen["llm"], valid(batch, hidden))
    logits = folder.get(f"{at}logits").unflatten(0, (len(laid), -1))
    shorter = [min(n, logits.shape[1]) for n in batch.lengths]
    padded = torch.nn.utils.rnn.pad_sequence(made.decoder.logits(seen["llm"]).split(batch.lengths), True)
    ours = valid(batch, padded, shorter)
    folder.close(f"{at}logits", ours, valid(batch, logits, shorter))
    folder.close(f"{at}velocity_pred", -torch.cat(predictions)[order])
    for g in batch.pictures:
        data = made._latents(g)
        for i, (owner, ordinal) in enumerate(zip(g.owners, g.ordinals, strict=True)):
            eps = draws[owner, f"noise{ordinal}"] if g.kind == Kind.NOISED else data[i]
            targets.append((data[i] - eps).flatten(1).T)
    folder.close(f"{at}velocity_target", torch.stack(targets)[order])
    text, image = (losses[k].sum / losses[k].count for k in ("text", "image"))
    folder.close(f"{at}text_loss", text[None])
    folder.close(f"{at}image_loss", image[None])
    folder.close(f"{at}loss", (text + image)[None])
    case = folder.meta["cases"][stage]
    folder.close(
        f"{stage}: losses as told",
        torch.stack([text, image, text + image]),
        torch.tensor([case[n] for n in ("text_loss", "image_loss", "loss")]),
    )
    (text + image).backward()
    gradients = export(
        cheers(made.config.vision.patch_size), {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
    )
    for name in folder.names(f"{at}grad."):
        folder.close(name, gradients[name.removeprefix(f"{at}grad.")])
    norms = case["grad_norms"]
    folder.same(f"{stage}: parameters with gradients", sorted(gradients.keys() - {"lm_head.weight"}), sorted(norms))
    for name, norm in norms.items():
        folder.close(f"{stage}: norm of grad.{name}", gradients[name].norm(), norm)


STAGES: dict[str, Callable[[Folder], None]] = {
    "weights": both_ways,
    "blocks": blocks,
    "understanding": understanding,
    "text_only": text_only,
    "velocity": velocity,
    "t2i_cfg": lambda folder: drawing(folder, "t2i_cfg"),
    "t2i_plain": lambda folder: drawing(folder, "t2i_plain"),
    "edit": lambda folder: drawing(folder, "edit"),
    "train_mixed": lambda folder: training(folder, "train_mixed"),
    "train_edit": lambda folder: training(folder, "train_edit"),
}
"""Every stage in order."""
