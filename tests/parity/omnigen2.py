"""OmniGen2 against numbers of the published code, stage by stage; nothing here knows the sizes of one folder.

The published code counts time from noise (0) to data (1) and predicts data - noise: times are turned round and
velocities change sign here and nowhere else. Recorded rows are padded; ours are compared where a row has tokens.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import count
from math import exp
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from diptych.core.batch import pack
from diptych.core.layout import Kind, Layout
from diptych.core.noise import Noise
from diptych.core.sample import Image, Sample, Text, assistant, user
from diptych.core.tensors import NONE, Tensor, to_float
from diptych.models import adapters, store
from diptych.models.omnigen2 import OmniGen2, Settings
from diptych.models.published.key_map import export
from diptych.models.published.omnigen2 import DIT, READER
from diptych.parts.attention import documents
from diptych.parts.dit import Rotation
from diptych.parts.flow import TimeDraw, schedule, shift_time
from diptych.parts.images import AreaRule, ShrinkRule, lanczos, latents_to_tokens, to_tensor, tokens_to_latents
from diptych.parts.reference_dit import Documents, NoisedPicture, Reference, ReferenceBlock, coordinates
from diptych.parts.solvers import dpm_step, euler_step
from tests.parity.compare import Folder

WEIGHTS = ("weights",)
CLOSE, GRADIENT, TIMES = 2e-4, 1e-3, 1e-6
NEGATIVE = frozenset({"text"})


@cache
def loaded(path: Path) -> OmniGen2:
    """The folder's model in float32."""
    made = store.load(path / "folder", dtype="fp32")
    assert isinstance(made, OmniGen2)
    made.config = replace(made.config, size=(64, 64))  # its small weights draw canvases below 256 pixels
    return made


def model(folder: Folder) -> OmniGen2:
    """The folder's model with gradients cleared and its own settings."""
    made = loaded(folder.path)
    made.zero_grad(set_to_none=True)
    return made


def close(folder: Folder, name: str, ours: Tensor, theirs: Tensor | float | None = None, by: float = CLOSE) -> None:
    folder.close(name, ours, theirs, by)


def tokens(made: OmniGen2, latent: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Latent tokens of (c, h, w) latents, and their grid."""
    patch = made.config.latent_patch
    return latents_to_tokens(latent[None], patch)[0], (latent.shape[-2] // patch, latent.shape[-1] // patch)


def latents(made: OmniGen2, x: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens_to_latents(x[None], grid, made.config.latent_patch)[0]


@contextmanager
def watched(**modules: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """The last output of modules by name; of ``inputs`` the first input."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
            kept[name] = (inputs[0] if name == "inputs" else output).detach()

        return hook

    hooks = [m.register_forward_hook(keep(name)) for name, m in modules.items()]
    yield kept
    for hook in hooks:
        hook.remove()


@contextmanager
def calls(dit: torch.nn.Module) -> Iterator[list[tuple[list[NoisedPicture], list[Tensor]]]]:
    """(pictures, velocities) of every call of the transformer."""
    kept: list[tuple[list[NoisedPicture], list[Tensor]]] = []
    hook = dit.register_forward_hook(lambda module, inputs, output: kept.append((inputs[0], output)))
    yield kept
    hook.remove()


# ---- weights and sizes ------------------------------------------------------------------------------------------


def both_ways(folder: Folder) -> None:
    """The folder is read strictly, written again, and every tensor and JSON file is what it was."""
    made, source = model(folder), folder.path / "folder"
    with tempfile.TemporaryDirectory() as out:
        written = store.save(made, Path(out) / "again", published=True)
        root = Path(written or Path(out) / "again")
        for file in sorted(source.rglob("*.safetensors")):
            name = file.relative_to(source)
            theirs, ours = load_file(file), load_file(root / name)
            folder.same(f"{name}: names", sorted(ours), sorted(theirs))
            folder.same(f"{name}: values", [n for n in theirs if not torch.equal(ours[n], theirs[n])], [])
        for file in sorted(source.rglob("*.json")):
            name = file.relative_to(source)
            folder.same(f"{name}", json.loads((root / name).read_text()), json.loads(file.read_text()))
    sums = {"transformer": made.dit, "vae": made.autoencoder, "mllm": made.mllm}
    for name, part in sums.items():
        folder.same(f"{name}: parameters", sum(p.numel() for p in part.parameters()), folder.meta["parameters"][name])


def sizes(folder: Folder) -> None:
    """The resize rules for pictures to draw from, to draw, and to read."""
    rules: dict[str, Callable[[int, int], tuple[int, int]]] = {
        "input_1024sq_1024": ShrinkRule(1024**2, 1024, 16),
        "train_1024sq_2048": ShrinkRule(1024**2, 2048, 16),
        "train_768sq_2048": ShrinkRule(768**2, 2048, 16),
        "train_512sq_2048": ShrinkRule(512**2, 2048, 16),
        "reader_sgt_256_1280_tokens": AreaRule(256 * 28**2, 1280 * 28**2, 28),
    }
    for name, rule in rules.items():
        for size, theirs in folder.meta["sizes"][name].items():
            folder.same(f"sizes {name} {size}", list(rule(*map(int, size.split("x")))), theirs)


# ---- the transformer --------------------------------------------------------------------------------------------


@torch.no_grad()
def rope(folder: Folder) -> None:
    """Position ids and rotations of the four streams."""
    made, case = model(folder), folder.meta["rope"]["mixed"]
    axes, patch = made.config.dit.axes, made.config.latent_patch
    for axis, width in enumerate(axes):
        theirs = folder.get(f"rope.table.{axis}.cos")
        turn = Rotation(torch.arange(len(theirs))[:, None], (width,), made.config.dit.theta)
        close(folder, f"rope.table.{axis}.cos", turn.cos[:, 0])
        close(folder, f"rope.table.{axis}.sin", turn.sin[:, 0])
    ids = folder.get("rope.out.mixed.position_ids")
    folder.same("text mask", folder.get("rope.in.mixed.text_mask").sum(1).tolist(), case["text_lengths"])
    for i, (words, refs, size) in enumerate(
        zip(case["text_lengths"], case["reference_latent_sizes"], case["latent_sizes"], strict=True)
    ):
        grids = [(h // patch, w // patch) for h, w in refs or []]
        places = coordinates(words, grids, (size[0] // patch, size[1] // patch))
        whole = torch.cat(places)
        folder.same(f"rope position ids {i}", whole, ids[i, : len(whole)])
        streams = {"text": (i, places[0]), "image": (i, places[-1]), "joint": (i, whole)}
        for name, (row, where) in streams.items():
            turn = Rotation(where, axes, made.config.dit.theta)
            for part in ("cos", "sin"):
                theirs = folder.get(f"rope.out.mixed.{name}.{part}")[row, : len(where)]
                close(folder, f"rope {name} {part} {i}", getattr(turn, part)[:, 0], theirs)
        if grids:
            where = torch.cat(places[1:-1])
            turn = Rotation(where, axes, made.config.dit.theta)
            for part in ("cos", "sin"):
                theirs = folder.get(f"rope.out.mixed.ref.{part}")[i, : len(where)]
                close(folder, f"rope ref {part} {i}", getattr(turn, part)[:, 0], theirs)


@torch.no_grad()
def blocks(folder: Folder) -> None:
    """Times, the condition's entry, patches, one block of every kind, and the way out."""
    made, at = model(folder), "blocks."
    dit = made.dit
    t = folder.get(f"{at}time.t")
    close(folder, f"{at}time.sinusoid", dit.time.sinusoid(made.config.dit.timestep_scale * t))
    close(folder, f"{at}time.embedding", dit.time(made.config.dit.timestep_scale * t))
    close(folder, f"{at}caption.out", dit.condition_in(dit.condition_norm(folder.get(f"{at}caption.in"))))
    close(folder, f"{at}patchify.tokens", tokens(made, folder.get(f"{at}patchify.latent"))[0])
    x, mask, temb = (folder.get(f"{at}block.{n}") for n in ("in", "mask", "temb"))
    ids, valid = folder.get(f"{at}block.position_ids"), mask.bool()
    lengths = valid.sum(1).tolist()
    rows = torch.arange(len(x)).repeat_interleave(torch.tensor(lengths))
    attend = Documents(lengths)
    turn = Rotation(ids[valid], made.config.dit.axes, made.config.dit.theta)
    for part in ("cos", "sin"):
        close(
            folder,
            f"{at}block.rotation.{part}",
            getattr(turn, part)[:, 0],
            folder.get(f"{at}block.rotation.{part}")[valid],
        )

    def same(name: str, ours: Tensor) -> None:
        close(folder, f"{at}{name}", ours, folder.get(f"{at}{name}")[valid])

    same("block.q_rotated_out", turn(folder.get(f"{at}block.q_rotated_in")[valid]))
    packed, layer = x[valid], dit.layers[0]
    assert isinstance(layer, ReferenceBlock) and layer.modulation is not None
    raw = layer.modulation(F.silu(temb)).chunk(4, -1)
    for name, value in (("gate_attn", raw[1]), ("scale_mlp", raw[2]), ("gate_mlp", raw[3])):
        theirs = folder.get(f"{at}block.norm1.{name}")
        close(folder, f"{at}block.norm1.{name}", value.reshape(theirs.shape), theirs)
    normed = layer.norms["before"](packed) * (1 + raw[0])[rows]
    same("block.norm1.out", normed)
    same("block.attn.out", layer.attention(normed, turn, attend))
    same("block.feed_forward.out", layer.mlp(packed))
    stacks = {"layers": dit.layers, "noise_refiner": dit.picture_refiner, "ref_image_refiner": dit.reference_refiner}
    for name, stack in stacks.items():
        same(f"block.{name}.0.out", stack[0](packed, turn, attend, temb, rows))
    same("block.context_refiner.0.out", dit.condition_refiner[0](packed, turn, attend))
    out = F.layer_norm(packed, packed.shape[-1:], eps=1e-6) * (1 + dit.modulation(F.silu(temb)))[rows]
    same("norm_out.out", dit.leave(out))


def recorded(folder: Folder, made: OmniGen2, name: str) -> list[NoisedPicture]:
    """The rows of a forward case."""
    case, at = folder.meta["forward"][name], f"forward.in.{name}."
    text, mask, t = (folder.get(f"{at}{n}") for n in ("text", "text_mask", "t"))
    rows = []
    for i, refs in enumerate(case["refs"]):
        x, grid = tokens(made, folder.get(f"{at}latent.{i}"))
        references = [Reference(*tokens(made, folder.get(f"{at}ref.{i}.{k}"))) for k in range(len(refs or ()))]
        rows.append(NoisedPicture(x, grid, t[i], text[i][mask[i].bool()], tuple(references)))
    return rows


@torch.no_grad()
def forward(folder: Folder) -> None:
    """The whole transformer: none, one and two references, and a ragged batch with all its stages."""
    made = model(folder)
    dit = made.dit
    for name in folder.meta["forward"]:
        rows = recorded(folder, made, name)
        inside = {
            "context": dit.condition_refiner[-1],
            "noise": dit.picture_refiner[-1],
            "ref": dit.reference_refiner[-1],
        }
        inside |= {f"layer.{i}": layer for i, layer in enumerate(dit.layers)} | {"norm_out": dit.leave}
        with watched(inputs=dit.layers[0], **inside) as seen:
            velocities = dit(rows)
        for i, (row, v) in enumerate(zip(rows, velocities, strict=True)):
            close(folder, f"forward.out.{name}.velocity.{i}", latents(made, v, row.grid))
        if name != "batch":
            continue
        words, pictures = [len(r.condition) for r in rows], [len(r.x) for r in rows]
        refs = [[len(ref.tokens) for ref in r.references] for r in rows]
        whole = [w + sum(r) + p for w, r, p in zip(words, refs, pictures, strict=True)]

        def rowwise(stage: str, ours: Tensor, lengths: list[int]) -> None:
            theirs = folder.get(f"forward.out.batch.{stage}")
            kept = torch.cat([row[:n] for row, n in zip(theirs, lengths, strict=True)])
            close(folder, f"forward.out.batch.{stage}", ours, kept)

        rowwise("context_refiner", seen["context"], words)
        rowwise("noise_refiner", seen["noise"], pictures)
        rowwise("ref_image_refiner", seen["ref"], [n for sample in refs for n in (sample or [0])])
        rowwise("joint_in", seen["inputs"], whole)
        folder.same("forward joint mask", folder.get("forward.out.batch.joint_mask").sum(1).tolist(), whole)
        for i in range(len(dit.layers)):
            rowwise(f"layer.{i}", seen[f"layer.{i}"], whole)
        theirs = folder.get("forward.out.batch.norm_out")
        last = [row[n - p : n] for row, n, p in zip(theirs, whole, pictures, strict=True)]
        close(folder, "forward.out.batch.norm_out", seen["norm_out"], torch.cat(last))


@torch.no_grad()
def lora(folder: Folder) -> None:
    """The published adapter file, added to the weights that it names."""
    made = model(folder)
    own = {k: v.clone() for k, v in made.dit.state_dict().items()}
    adapters.apply(made, folder.path / "lora" / adapters.PUBLISHED_FILE)
    [row] = recorded(folder, made, folder.meta["lora"]["case"].removeprefix("forward "))
    [v] = made.dit([row])
    made.dit.load_state_dict(own)
    close(folder, "lora.out.one_ref.velocity.0", latents(made, v, row.grid))


# ---- solvers ----------------------------------------------------------------------------------------------------


def scheduler(folder: Folder) -> None:
    """Times of both kinds, and both solvers on a linear field."""
    for name in folder.names("scheduler.euler."):
        theirs = folder.get(name)
        if "static" in name:
            close(folder, name, 1 - schedule(len(theirs) - 1, 1.0), by=TIMES)
        elif name.endswith(".timesteps"):
            _, _, steps, places, _ = name.split(".")
            close(folder, name, 1 - Settings(int(steps)).times(int(steps), int(places)), by=TIMES)
    a, b, x0 = (folder.get(f"scheduler.linear.{n}") for n in ("A", "b", "x"))
    places = folder.meta["scheduler"]["tokens_of_the_tracks"]
    for track in sorted({n.rsplit(".", 1)[0] for n in folder.names("scheduler.") if n.endswith(".v")}):
        kind, n = track.removeprefix("scheduler.").split(".")
        times, x, data = Settings(int(n)).times(int(n), places), x0, None
        states, velocities = [x], []
        for i in range(int(n)):
            v = x @ a.T + (1 - times[i]) * b
            velocities.append(v)
            if kind == "euler":
                x = euler_step(x, -v, times, i)
            else:
                x, data = dpm_step(x, -v, times, i, data)
            states.append(x)
        close(folder, f"{track}.x", torch.stack(states))
        close(folder, f"{track}.v", torch.stack(velocities))
        if f"{track}.sigmas" in folder.tensors:
            close(folder, f"{track}.sigmas", times, by=TIMES)


# ---- reader and autoencoder -------------------------------------------------------------------------------------


def request(prompt: str, *pictures: Image) -> Sample:
    return Sample("request", (user(*pictures, prompt), assistant(Image(None, "target"))))


def ids(laid: Layout) -> list[int]:
    return [i for s in laid.segments if s.kind == Kind.TEXT for i in s.ids]


def read(made: OmniGen2, rows: list[list[int]]) -> list[Tensor]:
    """Final states of rows of ids."""
    batch = pack([Layout(str(i), (made.reply(row).segments[0],)) for i, row in enumerate(rows)])
    positions = made.mllm.positions(batch.positions, [])
    return list(made.mllm(made.mllm.embed(batch.ids), positions, documents(batch)).split(batch.lengths))


@torch.no_grad()
def text(folder: Folder) -> None:
    """Ids of rendered prompts and the reader's states, whole and truncated."""
    made, at = model(folder), "text."
    rows, mask = folder.get(f"{at}in.ids"), folder.get(f"{at}in.mask").bool()
    prompts = folder.meta["text"]["text"]
    for i, words in enumerate(prompts.values()):
        folder.same(f"{at}in.ids {i}", ids(made.lay_out(request(words))), rows[i][mask[i]].tolist())
    first = list(prompts)[0]
    layers = {str(i): layer for i, layer in enumerate(made.mllm.language.layers)}
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda m, args, kw, i=i: inputs.__setitem__(i, (args[0] if args else kw["hidden_states"])[0]),
            with_kwargs=True,
        )
        for i, layer in layers.items()
    ]
    states = read(made, [row[m].tolist() for row, m in zip(rows, mask, strict=True)])
    for hook in hooks:
        hook.remove()
    close(folder, f"{at}out.hidden", torch.cat(states), folder.get(f"{at}out.hidden")[mask])
    n = int(mask[0].sum())
    for i in layers:
        name = f"{at}out.{first}.hidden.{i}"
        if name in folder.tensors:
            theirs = folder.get(name)
            close(folder, name, inputs[i][:n], theirs.reshape(-1, theirs.shape[-1])[:n])
    theirs = folder.get(f"{at}out.{first}.last_logits")
    close(folder, f"{at}out.{first}.last_logits", made.mllm.logits(states[0][-1:]).reshape(theirs.shape))
    cut = folder.get(f"{at}in.cut.ids")
    close(folder, f"{at}out.cut.hidden", read(made, cut.tolist())[0][None])


def picture(tensor: Tensor) -> PIL.Image.Image:
    return PIL.Image.fromarray(tensor.numpy())


@torch.no_grad()
def vae(folder: Folder) -> None:
    """Pixels, posterior, latents, the way back, and the Lanczos resize."""
    made, at = model(folder), "vae_io."
    image = picture(folder.get(f"{at}in.image"))
    pixels = to_float(to_tensor(image, image.size))[None]
    close(folder, f"{at}out.pixels", pixels)
    mean, logvar = made.autoencoder.moments(pixels).chunk(2, 1)
    close(folder, f"{at}out.mean", mean)
    close(folder, f"{at}out.logvar", logvar)
    latent = made.autoencoder.encode(pixels, folder.get(f"{at}in.noise"))
    close(folder, f"{at}out.latent", latent)
    close(folder, f"{at}out.decoded", made.autoencoder.decode(latent))
    wide = picture(folder.get(f"{at}in.lanczos.image"))
    size = ShrinkRule(4096, 96, 16)(*wide.size)
    close(folder, f"{at}out.lanczos.pixels", to_float(lanczos(wide, size))[None])


# ---- drawing ----------------------------------------------------------------------------------------------------


class Posterior(Noise):
    """Recorded draws in place of the addressed ones."""

    def __init__(self, draws: dict[tuple[str, str], Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "draws", draws)

    def normal(self, sample, name, shape):
        found = self.draws[sample, name]
        assert tuple(found.shape) == tuple(shape)
        return found


def draw(
    folder: Folder, made: OmniGen2, at: str, samples: list[Sample], negative: str, settings: Settings
) -> tuple[list[Tensor], list[list[list[Tensor]]], list[Tensor], list]:
    """A whole loop from recorded noise: states, the predictions of every step by branch and row, guided velocities."""
    start = folder.get(f"{at}latents")
    drawings = []
    for i, sample in enumerate(samples):
        contexts = []
        for drop in made.branches(sample, settings):
            laid = made.lay_out_away(sample, drop, negative)
            [context] = made.extend([made.open()], [laid])
            contexts.append(context)
        posterior = {
            ("drawing", f"posterior{k}"): folder.get(f"{at}posterior_noise.{k}")[0]
            for k in range(sum(n.startswith(f"{at}posterior_noise.") for n in folder.tensors))
        }
        encoded = made._encoded(sample, settings, Posterior(posterior))
        [drawing] = made.start([tuple(contexts)], [sample], [settings], [0])
        references = tuple(() if "image" in drop else encoded for drop in drawing.branches)
        private = replace(drawing.private, references=references)
        x, grid = tokens(made, start[i])
        assert tuple(grid) == made._grid(drawing.canvas)
        drawings.append(replace(drawing, state=x, private=private))
    states = [torch.stack([latents(made, d.state, grid) for d in drawings])]
    predictions: list[list[list[Tensor]]] = []
    guided: list[Tensor] = []
    for _ in range(drawings[0].steps):
        with calls(made.dit) as kept:
            drawings = made.step(drawings)
        rows = [latents(made, v, grid) for v in kept[0][1]]
        branches = len(rows) // len(drawings)
        predictions.append([[rows[r * branches + b] for r in range(len(drawings))] for b in range(branches)])
        guided.append(torch.stack([latents(made, -d.velocity, grid) for d in drawings]))
        states.append(torch.stack([latents(made, d.state, grid) for d in drawings]))
    return states, predictions, guided, drawings


@torch.no_grad()
def pipeline(folder: Folder) -> None:
    """Complete loops: text, image and combined guidance, ranges, solvers, references of several sizes, a batch."""
    made = model(folder)
    before = made.config
    for name, case in folder.meta["pipeline"].items():
        at = f"pipeline.in.{name}."
        limit = case.get("max_input_image_side_length", 1024)
        made.config = replace(before, source=ShrinkRule(case.get("max_pixels", 1024**2), limit, before.stride))
        hw = [before.autoencoder.downsample * side for side in case["latent_hw"]]
        prompts = case["prompt"] if isinstance(case["prompt"], list) else [case["prompt"]]
        pictures = [
            Image(picture(folder.get(f"{at}image.{k}")), "condition") for k in range(len(case.get("images", ())))
        ]
        for k, shown in enumerate(pictures):
            folder.same(f"pipeline {name} picture {k}", list(shown.pixels.size), case["images"][k])
        single = len(pictures) == 1 and case.get("align_res", True)
        size = None if single else (hw[1], hw[0])
        samples = [
            Sample(f"row{i}", (user(*pictures, p), assistant(Image(None, "target", size))))
            for i, p in enumerate(prompts)
        ]
        settings = Settings(
            case["steps"],
            case["text_guidance"],
            case.get("image_guidance", 1.0),
            tuple(case.get("cfg_range", (0.0, 1.0))),
            solver="dpm" if case.get("scheduler") == "dpm" else "euler",
        )
        folder.same(f"pipeline {name} canvas", list(made.canvas(samples[0])), hw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            states, predictions, guided, drawings = draw(folder, made, at, samples, case["negative"] or "", settings)
        out = f"pipeline.out.{name}."
        close(folder, f"{out}x", torch.stack(states))
        flat = [torch.stack(rows) for step in predictions for rows in step]
        close(folder, f"{out}predictions", torch.stack(flat))
        folder.same(f"pipeline {name} predictions", len(flat), len(case["predictions_are"]))
        close(folder, f"{out}velocity", torch.stack(guided))
        close(folder, f"{out}timesteps", 1 - drawings[0].times[:-1], by=TIMES)
        for k in range(len(pictures)):
            latent = latents(
                made, drawings[0].private.references[0][k].tokens, drawings[0].private.references[0][k].grid
            )
            close(folder, f"{out}ref_latent.{k}", latent)
        if f"{out}prompt_embeds" in folder.tensors:
            theirs = folder.get(f"{out}prompt_embeds")
            for row, drawing, full in zip(theirs, drawings, range(len(theirs)), strict=True):
                ours = drawing.private.conditions[0]
                close(folder, f"{out}prompt_embeds {full}", ours, row[: len(ours)])
        if f"{out}image" in folder.tensors:
            pixels = (made.finish(drawings) + 1) / 2
            theirs = folder.get(f"{out}image")
            if pixels.shape != theirs.shape:  # the published pipeline stretches to the size that was asked for
                pixels = F.interpolate(made.autoencoder.decode(states[-1]), theirs.shape[-2:], mode="bilinear")
                pixels = (pixels / 2 + 0.5).clamp(0, 1)
            close(folder, f"{out}image", pixels)
    made.config = before


@torch.no_grad()
def chat(folder: Folder) -> None:
    """Two pictures and a question: ids, positions, states, an answer, and a picture drawn in its place."""
    made, case, at = model(folder), folder.meta["chat"], "chat."
    pictures = [Image(picture(folder.get(f"{at}in.image.{k}")), "condition") for k in range(len(case["images"]))]
    question = Sample("chat", (user(*pictures, case["prompt"]), assistant()))
    laid = made.lay_out(question)
    image = made.tokenizer.id("<|image_pad|>")
    ours = [image if i == NONE else i for s in laid.segments for i in s.ids]
    folder.same(f"{at}in.input_ids", [ours])
    batch = pack([laid])
    groups = batch.of(Kind.VISION)
    positions = made.mllm.positions(batch.positions, groups)
    folder.same(f"{at}out.position_ids", positions[:, None])
    merged = made.config.mllm.model["vision_config"]["spatial_merge_size"]
    order = sorted((int(g.tokens[i, 0]), g.grid, v) for g in groups for i, v in enumerate(made.mllm.look(g.images)))
    folder.same(f"{at}in.image_grid_thw", [[1, g[0] * merged, g[1] * merged] for _, g, _ in order])
    close(folder, f"{at}out.image_tokens", torch.cat([v for *_, v in order]))
    [context] = made.extend([made.open()], [laid])
    whole = context.private.upto(context.length)
    close(folder, f"{at}out.hidden", whole.states[None])
    close(folder, f"{at}out.condition", made._states(context)[None])
    folder.same(f"{at}condition length", int(folder.get(f"{at}out.condition_mask").sum()), len(made._states(context)))
    theirs = folder.get(f"{at}out.last_logits")
    close(folder, f"{at}out.last_logits", context.logits.reshape(theirs.shape))
    said: list[int] = []
    while len(said) < len(case["greedy_ids"]):
        said.append(int(context.logits.argmax()))
        [context] = made.extend([context], [made.reply(said[-1:])])
    folder.same(f"{at}greedy ids", said, case["greedy_ids"])
    spec = case["draw"]
    hw = [made.config.autoencoder.downsample * side for side in spec["latent_hw"]]
    turn = assistant(Text("", loss=True), Image(None, "target", (hw[1], hw[0])))
    settings = Settings(spec["steps"], spec["text_guidance"], spec["image_guidance"])
    states, *_ = draw(
        folder, made, f"{at}in.draw.", [Sample("d", (question.messages[0], turn))], spec["negative"], settings
    )
    close(folder, f"{at}out.draw.x", torch.stack(states))
    close(
        folder,
        f"{at}in.pixel_values",
        torch.cat([patches(made, g.images) for g in sorted(groups, key=lambda g: int(g.tokens[0, 0]))]),
    )


def patches(made: OmniGen2, images: Tensor) -> Tensor:
    """What the vision tower takes: patches of normalised pixels, repeated for every frame."""
    kept: list[Tensor] = []
    hook = made.mllm.model.visual.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    made.mllm.look(images)
    hook.remove()
    return kept[0]


# ---- training ---------------------------------------------------------------------------------------------------


class Draws(TimeDraw):
    """The recorded normal draws of the published code, which counts time the other way round."""

    def __init__(self, draws: dict[tuple[str, int], Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "draws", draws)

    def __call__(self, noise, owners, ordinals):
        return torch.stack([torch.sigmoid(-self.draws[key]) for key in zip(owners, ordinals, strict=True)])


def times(folder: Folder) -> None:
    """Training times of pictures of many sizes."""
    made, at = model(folder), "training.times."
    u, cases = folder.get(f"{at}u"), folder.meta["training"]["time_latent_sizes"]
    patch = made.config.latent_patch

    def shifted(kind: str) -> Tensor:
        out = []
        for i, (h, w) in enumerate(cases):
            n = h * w // patch**2
            m = {
                "v1": exp(0.5 + 0.65 * (n - 256) / 3840),
                "v2": n**0.5 / 20,
                "fixed": exp(0.5 + 0.65 * (1024 - 256) / 3840),
            }
            out.append(1 - shift_time(torch.sigmoid(-u[i]), m[kind]))
        return torch.stack(out)

    close(folder, f"{at}v1", shifted("v1"), by=TIMES)
    close(folder, f"{at}v2", shifted("v2"), by=TIMES)
    close(folder, f"{at}v1_fixed_1024", shifted("fixed"), by=TIMES)


def flow(folder: Folder, stage: str) -> None:
    """A flow loss with everything inside it, and gradients of every parameter: ``flow`` (OmniGen2's trainer) or ``sgt``
    (drawing rows of SGT, with the photo in the reader)."""
    made, case, at = model(folder), folder.meta["training"][stage], f"training.in.{stage}."
    before = made.config
    free, clock, noise, laid = ShrinkRule(1 << 40, 1 << 20, before.stride), {}, {}, []
    u = folder.get(f"{at}u")
    down = before.autoencoder.downsample
    for i, words in enumerate(case["instructions"]):
        name = f"row{i}"
        latent = folder.get(f"{at}latent.{i}")
        size = (latent.shape[-1] * down, latent.shape[-2] * down)
        target = Image(None, "target", size, encoded={"autoencoder": latent})
        refs = (case.get("refs") or [None] * len(case["instructions"]))[i] or []
        sources = []
        for k in range(len(refs)):
            ref = folder.get(f"{at}ref.{i}.{k}")
            sources.append(
                Image(None, "condition", (ref.shape[-1] * down, ref.shape[-2] * down), encoded={"source": ref})
            )
        if stage == "sgt":
            sources = [Image(picture(folder.get(f"{at}image.{i}")), "understand")]
        drop = NEGATIVE if not words else frozenset()
        made.config = replace(before, draw=free, sources=(free,), times=Draws(clock))
        laid.append(made.lay_out(Sample(name, (user(*sources, words), assistant(target))), drop))
        clock[name, 0], noise[name, "noise0"] = u[i], tokens(made, folder.get(f"{at}noise.{i}"))[0]
    rows, mask = folder.get(f"{at}ids"), folder.get(f"{at}mask").bool()
    image = made.tokenizer.id("<|image_pad|>")
    for i, one in enumerate(laid):
        reader = [s for s in one.segments if s.kind in (Kind.TEXT, Kind.VISION)]
        ours = [image if x == NONE else x for s in reader for x in s.ids]
        ours = ours[:-1] if ours[-1] == made.picture else ours  # the token that opens a picture conditions nothing
        folder.same(f"{stage} ids {i}", ours, rows[i][mask[i]].tolist())
    if f"{at}image_grid_thw" in folder.tensors:
        merged = before.mllm.model["vision_config"]["spatial_merge_size"]
        grids = [
            [1, s.grid[0] * merged, s.grid[1] * merged] for one in laid for s in one.segments if s.kind == Kind.VISION
        ]
        folder.same(f"{at}image_grid_thw", grids)
    for p in made.parameters():
        p.requires_grad_(True)
    batch = pack(laid)
    with calls(made.dit) as captured, watched(states=made.mllm) as inside:
        terms = made.losses(batch, Posterior(noise))
    made.config = before
    drawn, velocities = captured[0]
    order = [int(i) for g in batch.of(Kind.NOISED) for i in batch.document[g.tokens[:, 0]]]
    out = f"training.out.{stage}."
    recorded_text = folder.get(f"{out}text")
    opened = batch.ids[[s.kind in (Kind.TEXT, Kind.VISION) for one in laid for s in one.segments for _ in s.ids]]
    theirs = torch.cat([row[m] for row, m in zip(recorded_text, mask, strict=True)])
    close(folder, f"{out}text", inside["states"][opened != made.picture], theirs)
    theirs = folder.get(f"{out}t")
    errors = torch.zeros(len(laid))
    for j, i in enumerate(order):
        row, v = drawn[j], velocities[j]
        close(folder, f"{out}t {i}", row.t, theirs[i], by=TIMES)
        close(folder, f"{out}x_t.{i}", latents(made, row.x, row.grid))
        close(folder, f"{out}velocity.{i}", latents(made, v, row.grid))
        target = folder.get(f"{at}latent.{i}") - folder.get(f"{at}noise.{i}")
        errors[i] = (latents(made, v, row.grid) - target).square().sum()
    close(folder, f"{out}squared_error_sums", errors)
    loss = terms["image"].sum / terms["image"].count
    close(folder, f"{out}loss", loss[None])
    close(folder, f"{stage}: loss as told", loss, case["loss"])
    loss.backward()
    gradients(folder, made, stage)


def gradients(folder: Folder, made: OmniGen2, stage: str) -> None:
    """Gradients and norms of every recorded parameter."""
    both = {"transformer": (made.dit, DIT), "mllm": (made.mllm, READER)}
    found: dict[str, Tensor] = {}
    for name, (part, rules) in both.items():
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in part.named_parameters()}
        found |= {f"{name}.{n}": g for n, g in export(rules, grads).items()}
    for name in folder.names(f"training.grad.{stage}."):
        close(folder, name, found[name.removeprefix(f"training.grad.{stage}.")])
    for name, norm in folder.meta["training"][stage]["grad_norms"].items():
        close(folder, f"{stage}: norm of grad.{name}", found[name].norm(), norm, GRADIENT)


def sft(folder: Folder) -> None:
    """SGT's question rows: ids, positions, logits, cross-entropy and gradients of the reader."""
    made, case, at = model(folder), folder.meta["training"]["sft"], "training.in.sft."
    before = made.config
    made.config = replace(before, labels="drawing")
    shown = (picture(folder.get(f"{at}image.{k}")) for k in count())
    end, laid = made.stop, []
    for i, (question, answer) in enumerate(zip(case["questions"], case["answers"], strict=True)):
        parts: list[Any] = []
        for j, piece in enumerate(question.replace("<image>\n", "<image>").split("<image>")):
            parts += [Image(next(shown), "understand")] if j else []
            parts += [piece] if piece else []
        laid.append(made.lay_out(Sample(f"row{i}", (user(*parts), assistant(answer)))))
    made.config = before
    image = made.tokenizer.id("<|image_pad|>")
    merged = before.mllm.model["vision_config"]["spatial_merge_size"]
    for p in made.parameters():
        p.requires_grad_(True)
    entropies = []
    for i, one in enumerate(laid):
        prompt, answer = folder.get(f"{at}prompt_ids.{i}").tolist(), folder.get(f"{at}answer_ids.{i}").tolist()
        ours = [image if x == NONE else x for s in one.segments for x in s.ids]
        folder.same(f"{at}ids {i}", ours, [*prompt, *answer, end])
        batch = pack([one])
        groups = batch.of(Kind.VISION)
        if f"{at}image_grid_thw.{i}" in folder.tensors:
            grids = [[1, s.grid[0] * merged, s.grid[1] * merged] for s in one.segments if s.kind == Kind.VISION]
            folder.same(f"{at}image_grid_thw.{i}", grids)
        s = made._read(batch, Noise())
        n = len(prompt) + len(answer)
        folder.same(f"training.out.sft.position_ids.{i}", made.mllm.positions(batch.positions, groups)[:, :n])
        states = made.mllm(s.x, s.positions, documents(s.columns))
        logits = made.mllm.logits(states[len(prompt) - 1 : n - 1])
        close(folder, f"training.out.sft.logits.{i}", logits)
        entropies.append(F.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    each = torch.cat(entropies)
    close(folder, "training.out.sft.cross_entropy", each)
    close(folder, "training.out.sft.loss", each.mean()[None])
    close(folder, "sft: loss as told", each.mean(), case["loss"])
    each.mean().backward()
    gradients(folder, made, "sft")


STAGES: dict[str, Callable[[Folder], None]] = {
    "weights": both_ways,
    "sizes": sizes,
    "rope": rope,
    "blocks": blocks,
    "forward": forward,
    "lora": lora,
    "scheduler": scheduler,
    "text": text,
    "vae": vae,
    "pipeline": pipeline,
    "chat": chat,
    "times": times,
    "flow": lambda folder: flow(folder, "flow"),
    "sgt": lambda folder: flow(folder, "sgt"),
    "sft": sft,
}
"""Every stage in order."""
