"""BAGEL's inferencer and sample packer, end to end, against complete runs of the published classes.

A folder holds a model, pictures, requests and what came of them. The contexts, positions, ids and sizes must be equal;
final latents, velocities and losses within the tolerance; pixels may differ by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from diptych.core.batch import pack
from diptych.core.layout import Kind, Layout
from diptych.core.sample import Image, Message, Sample, Text, assistant, user
from diptych.core.tensors import NONE, Tensor
from diptych.data.decoding import open_picture
from diptych.data.variants import edit_chains
from diptych.generation.scheduler import ImageJob, ImageRequest, Scheduler, TextJob, TextRequest
from diptych.generation.thinking import Think, instructed
from diptych.models.bagel import Bagel, Config, Settings
from diptych.models.protocol import Context
from diptych.models.sizes import Sizes
from diptych.parts.flow import TimeDraw, shift_time
from diptych.parts.images import SizeRule
from diptych.parts.positions import grid_places
from diptych.parts.tokenizer import Tokenizer
from tests.parity import bagel
from tests.parity.bagel import RecordedNoise, index_tensors
from tests.parity.compare import Folder

WEIGHTS = ("ema", "ae")
BRANCHES = ("gen", "cfg_text", "cfg_img")


def rule(folder: Folder, name: str, over: str = "ratio") -> SizeRule:
    """A size rule of the folder."""
    r = folder.config["image_rules"][name]
    names = ("max_image_size", "min_image_size", "image_stride", "max_pixels")
    return SizeRule(*(r[n] for n in names), over=over)


class Unbounded(Config):
    """A config that draws any multiple of the stride: the published inferencer refuses no size."""

    @property
    def trained(self) -> Sizes:
        return replace(super().trained, shortest=self.stride, longest=1 << 20)


def config(folder: Folder) -> Config:
    """The folder's sizes and size rules, read as the inferencer does."""
    made = replace(bagel.config(folder), see=rule(folder, "vit"), draw=rule(folder, "vae"))
    made = replace(made, reading="inferencer", markers_in_text=True)
    return Unbounded(**{f.name: getattr(made, f.name) for f in fields(made)})


def model(folder: Folder) -> Bagel:
    """The folder's model in float32 with its tokenizer."""
    known = {"config": config(folder), "tokenizer": Tokenizer.load(folder.path / "tokenizer")}
    bare = bagel.model(folder)
    made = Bagel(**known)
    made.load_state_dict(bare.state_dict())
    return made.eval()


# ---- sizes ------------------------------------------------------------------------------------------------------


def sizes(folder: Folder) -> None:
    """The size rules on many sizes, at published sizes and at the folder's own, and the pixels of two resizings."""
    see = SizeRule(980, 224, 14, over="ratio")
    published = replace(Config.b7_mot(), see=see, draw=SizeRule(1024, 512, 16, over="ratio"))
    names = {
        "inferencer_vit": "inferencer",
        "vit_rule_alone": "training",
        "scripts_vit_378": "scripts",
        "vlm_eval": "benchmarks",
        "edit_training_vit": "edits",
        "sgt_training_vit": "proxies",
    }
    for row in folder.meta["published_sizes"]["rows"]:
        size = tuple(row["input"])
        once = published.draw(*size)
        folder.same(f"vae {size}", list(once), row["vae"])
        folder.same(f"vae twice {size}", list(published.draw(*once)), row["vae_rule_twice"])
        for theirs, reading in names.items():
            if theirs in row:
                folder.same(f"{reading} {size}", list(through(published.seen(reading), size)), row[theirs])
    c = config(folder)
    for row in folder.meta["tiny_sizes"]:
        size = tuple(row["input"])
        third = replace(c.see, pixels=c.see.pixels // 3)
        folder.same(f"tiny vae {size}", list(c.draw(*size)), row["vae"])
        folder.same(f"tiny vae, vit {size}", list(through(c.seen("inferencer"), size)), row["then_vit"])
        folder.same(f"tiny vit {size}", list(c.see(*size)), row["vit_alone"])
        folder.same(f"tiny vit of 3 {size}", list(third(*size)), row["vit_alone_of_3"])
    made = model(folder)
    for name in [n for n in folder.names("pictures.") if n.count(".") == 1]:
        image = Image(picture(folder, name.removeprefix("pictures.")), "condition")
        clean, seen = made.lay_out(Sample("p", (user(image), assistant(Image(None, "target"))))).segments
        for block, after in ((clean, "after_vae_rule"), (seen, "after_both_rules")):
            assert block.image is not None
            folder.same(f"{name}.{after}", block.image.permute(1, 2, 0), folder.get(f"{name}.{after}"))


def through(rules: Sequence[SizeRule], size: tuple[int, int]) -> tuple[int, int]:
    """The size after several rules."""
    for each in rules:
        size = each(*size)
    return size


def picture(folder: Folder, name: str) -> PIL.Image.Image:
    """A picture of the folder, with its transparency laid on white."""
    return open_picture(PIL.Image.fromarray(np.asarray(folder.get(f"pictures.{name}"))))


# ---- runs -------------------------------------------------------------------------------------------------------


def request(folder: Folder, made: Bagel, name: str, case: dict[str, Any]) -> Sample:
    """The request of a case: its texts and pictures in order. Pictures to draw from hold the recorded latents."""
    parts: list[Text | Image] = []
    sources = 0
    for item in case["items"]:
        if item in folder.meta["texts"]:
            parts.append(Text(folder.meta["texts"][item]))
            continue
        image = Image(picture(folder, item), "understand" if case["understanding_output"] else "condition")
        eps = f"runs.{name}.vae_eps.{sources}"
        if case["understanding_output"] or not any(c["kind"] == "vae" for c in case["contexts"]):
            parts.append(replace(image, role="understand"))
            continue
        parts.append(with_latents(made, image, folder.get(eps)))
        sources += 1
    return Sample(name, (Message("user", tuple(parts)),))


def with_latents(made: Bagel, image: Image, eps: Tensor) -> Image:
    """The picture encoded with recorded noise."""
    [clean, _] = made.lay_out(Sample("p", (user(image), assistant(Image(None, "target"))))).segments
    assert clean.image is not None
    with torch.no_grad():
        latents = made.autoencoder.encode(bagel.to_float(clean.image[None]), eps)[0]
    return replace(image, encoded={"autoencoder": latents})


def expected_contexts(case: dict[str, Any]) -> dict[str, tuple[list[Any], int, int]]:
    """What each branch reads (ids of texts, sizes of pictures), its length and its position, from the record."""
    found: dict[str, tuple[list[Any], int, int]] = {name: ([], 0, 0) for name in BRANCHES}
    for event in case["contexts"]:
        read, _, _ = found[event["context"]]
        what = event["ids"] if event["kind"] == "text" else [event["kind"], *event["resized_wh"]]
        found[event["context"]] = ([*read, what], event["kv"][1], event["position"][1])
    return found


def contents(made: Bagel, laid: Layout) -> list[Any]:
    """The same of a layout."""
    c, out = made.config, list[Any]()
    strides = {Kind.VISION: ("vit", c.vision.patch_size), Kind.CLEAN: ("vae", c.stride)}
    for s in laid.segments:
        if s.kind == Kind.TEXT:
            out.append(list(s.ids))
            continue
        assert s.grid
        name, stride = strides[s.kind]
        out.append([name, s.grid[1] * stride, s.grid[0] * stride])
    return out


def settings(folder: Folder, case: dict[str, Any]) -> Settings:
    """The settings that the inferencer came to."""
    return bagel.settings(case["drawing"]["settings"])


def runs(folder: Folder) -> None:
    """Every case: contexts, decoded ids, sizes, every stored state, and the finished picture."""
    made = model(folder)
    prompts = folder.meta["system_prompts"]
    folder.same("system text of drawing", made.think_before_drawing, prompts["think_before_drawing"]["text"])
    folder.same("system text of answering", made.think_before_answering, prompts["think_before_answering"]["text"])
    for name, case in folder.meta["cases"].items():
        if case.get("drawing", {}).get("settings", {}).get("enable_taylorseer"):
            continue  # TaylorSeer's cache of steps, which diptych does not have
        (answer if case["understanding_output"] else draw)(folder, made, name, case)


def answer(folder: Folder, made: Bagel, name: str, case: dict[str, Any]) -> None:
    """A question: what is read, the greedy ids and their scores."""
    decode, sample = case["decode"], request(folder, made, name, case)
    asked = TextRequest(sample, decode["max_length"] - 1, think=case["think"], pictures=0)
    loop = Scheduler(made, slots=1)
    job = loop.submit(asked)
    assert isinstance(job, TextJob)
    laid = made.lay_out(job.opened)
    *read, start = contents(made, laid)
    folder.same(f"{name}: start", start, decode["ids"][:1])
    if not case["think"]:
        folder.same(f"{name}: read", read, expected_contexts(case)["gen"][0])
    before = replace(laid, segments=laid.segments[:-1])
    [context] = made.extend([made.open()], [before])
    folder.same(f"{name}: starts at", [context.length, context.position], [*decode["starts_at"].values()])
    check_decoding(folder, made, f"{name}: ids", f"runs.{name}.decode.logits", context, decode)
    while not loop.idle:
        loop.tick()
    folder.same(f"{name}: ids of the engine", job.ids, decode["ids"][1:])
    folder.same(f"{name}: text", job.text, decode["text"])


def check_decoding(
    folder: Folder, made: Bagel, label: str, name: str, context: Context, decode: dict[str, Any]
) -> None:
    """Greedy ids from a context, and the recorded scores of all steps or of the first and last."""
    ids, rows = decode["ids"], []
    for word in ids:
        [context] = made.extend([context], [made.reply([word])])
        rows.append(context.logits)
    best = [int(row.argmax()) for row in rows]
    ended = [made.markers["eos"]] if decode["ended_by_eos"] else best[-1:]
    folder.same(label, best, [*ids[1:], *ended])
    folder.close(name, torch.stack(rows if decode["stored_logits"] == "all" else [rows[0], rows[-1]]))


def draw(folder: Folder, made: Bagel, name: str, case: dict[str, Any]) -> None:
    """A picture: the contexts of all branches, its states and its pixels, and a plan before it."""
    sample, drawing, how = request(folder, made, name, case), case["drawing"], settings(folder, case)
    height, width = case["output_hw"]
    size = None if case["image_shapes_hw"] is None else (width, height)
    think = Think(case["decode"]["max_length"] - 1) if case["think"] else None
    loop = Scheduler(made, slots=1)
    job = loop.submit(ImageRequest(sample, 0, size, how, think=think))
    assert isinstance(job, ImageJob)
    folder.same(f"{name}: canvas", list(job.canvas), [height, width])
    opened = job.opened
    if case["think"]:
        opened = instructed(opened, made.think_before_drawing)
        check_plan(folder, made, name, case, opened)
        opened = made.planned(opened, case["decode"]["text"])
    record = expected_contexts(case)
    contexts = []
    for branch, drop in zip(BRANCHES, made.branches(opened, how), strict=False):
        laid = made.lay_out(opened, drop)
        if not case["think"]:
            if branch != "cfg_text":  # the record has no events of it, for it is a copy
                folder.same(f"{name}: {branch} reads", contents(made, laid), record[branch][0])
        [context] = made.extend([made.open()], [laid]) if len(laid) else [made.open()]
        folder.same(f"{name}: {branch} length", context.length, drawing["kv_lens"][branch])
        folder.same(f"{name}: {branch} position", context.position, drawing["position"][branch])
        keys = f"runs.{name}.cache.{branch}.last_layer_keys"
        if keys in folder.tensors:
            folder.close(keys, context.cache.buffer[-1, 0, : context.length])
        contexts.append(context)
    c = made.config
    places = grid_places((height // c.stride, width // c.stride), c.latent_side, stretch=c.stretch)
    folder.same(f"{name}: places", places, torch.tensor(drawing["latent_position_ids"]).tolist())
    check_steps(folder, made, name, case, opened, tuple(contexts), how)
    if case["think"]:
        while not loop.idle:
            loop.tick()
        folder.same(f"{name}: plan of the engine", job.plan, case["decode"]["text"])
        folder.same(f"{name}: branches of the engine", list(job.branches), list(made.branches(opened, how)))


def check_plan(folder: Folder, made: Bagel, name: str, case: dict[str, Any], opened: Sample) -> None:
    """The plan of a case: greedy ids from the whole context, and the ids that are read on."""
    decode = case["decode"]
    laid = made.lay_out(replace(opened, messages=(*opened.messages[:-1], assistant())))
    [context] = made.extend([made.open()], [replace(laid, segments=laid.segments[:-1])])
    folder.same(f"{name}: plan starts at", [context.length, context.position], [*decode["starts_at"].values()])
    check_decoding(folder, made, f"{name}: plan", f"runs.{name}.decode.logits", context, decode)
    folder.same(f"{name}: plan text", made.spoken(decode["ids"][1:]), decode["text"])
    [*_, plan] = made.lay_out(made.planned(opened, decode["text"])).segments
    folder.same(f"{name}: plan read on", list(plan.ids), decode["ids_read_on"])


def check_steps(
    folder: Folder,
    made: Bagel,
    name: str,
    case: dict[str, Any],
    opened: Sample,
    contexts: tuple[Context, ...],
    how: Settings,
) -> None:
    """Times, stored states and velocities, and the end."""
    at, stored = f"runs.{name}", case["stored_evaluations"]
    states = folder.get(f"{at}.x_t")
    [drawing] = made.start([contexts], [opened], [how], [0])
    drawing = replace(drawing, state=states[0])
    seen, velocities, evaluated = [], [], []
    while not drawing.done:
        assert drawing.times is not None
        evaluated.append(len(contexts) if how.guided(float(drawing.times[drawing.step])) else 1)
        seen.append(drawing.state)
        [drawing] = made.step([drawing])
        velocities.append(drawing.velocity)
    assert drawing.times is not None
    folder.close(f"{at}.t", drawing.times[:-1], tolerance=1e-6)
    folder.same(f"{name}: evaluations", len(seen), case["evaluations"])
    folder.same(f"{name}: branches evaluated", evaluated, case["branches_evaluated"])
    folder.close(f"{at}.x_t", torch.stack([seen[i] for i in stored]))
    if f"{at}.velocity" in folder.tensors:
        folder.close(f"{at}.velocity", torch.stack([velocities[i] for i in stored]))
    if f"{at}.branch_velocities" in folder.tensors:
        check_branches(folder, made, f"{at}.branch_velocities", replace(drawing, step=0), seen)
    folder.close(f"{at}.final_latent", drawing.state)
    published = replace(drawing, settings=replace(how, seeding="published"))
    pixels = made.finish([published])[0]
    if f"{at}.decoded" in folder.tensors:
        folder.close(f"{at}.decoded", made.finish([drawing])[0], folder.get(f"{at}.decoded").clamp(-1, 1))
    whole = ((pixels * 0.5 + 0.5) * 255).round().permute(1, 2, 0)
    folder.within(f"{at}.pixels", whole, 1)


def check_branches(folder: Folder, made: Bagel, name: str, drawing: Any, seen: list[Tensor]) -> None:
    """Velocities of every branch at the first and the last evaluation; NaN where one was not evaluated."""
    recorded = folder.get(name)
    for row, step in zip(recorded, (0, len(seen) - 1), strict=True):
        branches = [i for i, v in enumerate(row) if not torch.isnan(v).any()]
        t = drawing.times[step : step + 1]
        table = made._fixed([drawing])
        with torch.inference_mode():
            ours = made._velocity(seen[step][None], t, [drawing], table, len(branches))
        folder.close(f"{name}: evaluation {step}", ours[:, 0], row[branches])


def said_to_read(folder: Folder) -> None:
    """Generated ids, the text that they are, and the ids that are read on."""
    made = model(folder)
    for i, row in enumerate(folder.meta["said_to_read"]["rows"]):
        ids = row["ids"]
        text = made.spoken([x for x in _until(ids[1:], made.markers["eos"])])
        folder.same(f"said {i}: text", text, row["text"])
        folder.same(f"said {i}: read on", list(made._text(Text(row["text"])).ids), row["ids_read_on"])


def _until(ids: Sequence[int], end: int) -> Iterator[int]:
    for i in ids:
        if i == end:
            return
        yield i


def published_seeds(folder: Folder) -> None:
    """The noise of a seed is that of one generator in the order of the published code."""
    made = model(folder)
    for name, case in folder.meta["cases"].items():
        if case["understanding_output"] or "order_of_draws" not in case:
            continue
        sample = request(folder, made, name, case)
        height, width = case["output_hw"]
        size = None if case["image_shapes_hw"] is None else (width, height)
        opened = replace(sample, messages=(*sample.messages, assistant(Image(None, "target", size))))
        seed = 7
        drawn, noise = made._published_noise(opened, seed)
        generator = torch.Generator().manual_seed(seed)
        shapes = [folder.tensors[f"runs.{name}.vae_eps.{i}"].shape for i in range(len(case["order_of_draws"]) - 1)]
        shapes.append(folder.tensors[f"runs.{name}.x_t"][0].shape)
        for i, (ours, shape) in enumerate(zip([*drawn, noise], shapes, strict=True)):
            folder.same(f"{name}: draw {i}", torch.equal(ours, torch.randn(shape, generator=generator)), True)


# ---- training ---------------------------------------------------------------------------------------------------


def chains(folder: Folder) -> None:
    """Every chain that an edit row can give, with its probability."""
    texts = folder.meta["edit_chains"]["instruction_list"]
    for n in sorted({row["pictures"] for row in folder.meta["edit_chains"]["rows"]}):
        rows = [row for row in folder.meta["edit_chains"]["rows"] if row["pictures"] == n]
        theirs = sorted((r["start"], tuple(r["plan"]), tuple(r["texts"]), round(r["probability"], 9)) for r in rows)
        merged: dict[tuple, float] = {}
        for start, plan, said, p in theirs:
            merged[start, plan, said] = merged.get((start, plan, said), 0.0) + p
        ours: dict[tuple, float] = {}
        for chain, p in edit_chains(n):
            words = tuple(chain.text([wordings[0] for wordings in texts]))
            plan = []
            for source, target in chain.pairs:
                plan += [f"vae_image:{source}", f"vit_image:{source}", "text", f"vae_image:target:{target}"]
            key = (chain.start, tuple(plan), words)
            ours[key] = ours.get(key, 0.0) + p
        folder.same(f"chains of {n}", sorted(ours), sorted(merged))
        pairs = torch.tensor([[ours.get(k, 0.0), merged[k]] for k in sorted(merged)])
        folder.close(f"probabilities of chains of {n}", *pairs.T, tolerance=1e-6)


def the_samples(folder: Folder) -> list[Sample]:
    """The four samples of a pack."""
    texts, chain = folder.meta["training"]["texts"], folder.get
    images = [PIL.Image.fromarray(np.asarray(chain(f"training.chain.{i}"))) for i in range(5)]
    question = PIL.Image.fromarray(np.asarray(folder.get("training.question.picture")))
    first, second = texts["chain"]
    return [
        Sample("edit", (user(Image(images[0], "condition"), texts["edit"][0]), assistant(Image(images[1], "target")))),
        Sample(
            "chain",
            (
                user(Image(images[0], "condition"), first),
                assistant(Image(images[1], "target")),
                user(second),
                assistant(Image(images[2], "target")),
            ),
        ),
        Sample("draw", (user(texts["draw"]), assistant(Image(images[4], "target")))),
        Sample("ask", (user(Image(question), texts["ask"]), assistant(texts["answer"]))),
    ]


def recorded(folder: Folder, name: str, what: str) -> Tensor:
    """A tensor of a pack; of an earlier one where the two are equal."""
    key = f"{name}.in.{what}"
    return folder.get(f"training.{folder.meta['training']['same_as'].get(key, key)}")


PACKS: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "text": frozenset({"text"}),
    "vae_not_vit": frozenset({"latents"}),
    "vit_not_vae": frozenset({"features"}),
    "both_pictures": frozenset({"image"}),
}


def mixed_drops(folder: Folder, made: Bagel) -> dict[str, frozenset[str]]:
    """Which segments the mixed pack lost, from its splits: by sample, those whose layout gives the recorded ones."""
    meta = folder.meta["training"]["packs"]["mixed"]
    splits = iter(zip(meta["split_lens"], meta["attn_modes"], strict=True))
    out = {}
    for sample, total in zip(the_samples(folder), meta["sample_lens"], strict=True):
        mine: list[tuple[int, str]] = []
        while sum(n for n, _ in mine) < total:
            mine.append(next(splits))
        out[sample.id] = next(d for d in _subsets(sample) if modes(made.lay_out(sample, d)) == mine)
    return out


def modes(laid: Layout) -> list[tuple[int, str]]:
    """Length and attention of every segment, in the record's words."""
    return [(len(s), "noise" if s.hidden else "full" if s.full else "causal") for s in laid.segments]


def _subsets(sample: Sample) -> Iterator[frozenset[str]]:
    texts = sum(isinstance(p, Text) and not p.loss for m in sample.messages for p in m.parts)
    pictures = max(0, sum(1 for _ in sample.images()) - 1) if sample.drawing else 0
    names = [f"text:{i}" for i in range(texts)]
    names += [f"{kind}:{i}" for i in range(pictures) for kind in ("latents", "features")]
    for bits in range(1 << len(names)):
        yield frozenset(name for i, name in enumerate(names) if bits >> i & 1)


def training(folder: Folder) -> None:
    """Layout, predictions and losses of each pack."""
    made = model(folder)
    packs = {name: dict.fromkeys(("edit", "chain", "draw", "ask"), drop) for name, drop in PACKS.items()}
    packs["mixed"] = mixed_drops(folder, made)
    for name in folder.meta["training"]["packs"]:
        check_pack(folder, made, name, packs[name])


def check_pack(folder: Folder, made: Bagel, name: str, drops: dict[str, frozenset[str]]) -> None:
    """One pack: index tensors, velocities and both losses of every token."""
    meta = folder.meta["training"]["packs"][name]
    laid = [made.lay_out(sample, drops[sample.id]) for sample in the_samples(folder)]
    encoded = iter(encode(folder, made, name, laid))
    laid = [
        replace(
            q,
            segments=tuple(
                replace(s, image=next(encoded), encoded=True) if s.kind in (Kind.CLEAN, Kind.NOISED) else s
                for s in q.segments
            ),
        )
        for q in laid
    ]
    batch, c = pack(laid, made.routes), made.config
    folder.same(f"{name}: sample_lens", list(batch.lengths), meta["sample_lens"])
    splits = [list(x) for x in zip(*(pair for q in laid for pair in modes(q)), strict=True)]
    folder.same(f"{name}: splits", splits, [meta["split_lens"], meta["attn_modes"]])
    at = f"training.{name}.in."
    index_tensors(folder, batch, at)
    seen = [s.grid for q in laid for s in q.segments if s.kind == Kind.VISION]
    latent = [s.grid for q in laid for s in q.segments if s.kind in (Kind.CLEAN, Kind.NOISED)]
    places = [grid_places(g, c.seen_side, stretch=c.stretch) for g in seen]
    folder.same(f"{at}packed_vit_position_ids", torch.cat(places))
    folder.same(f"{at}vit_token_seqlens", [h * w for h, w in seen])
    places = [grid_places(g, c.latent_side, stretch=c.stretch) for g in latent]
    folder.same(f"{name}: latent places", torch.cat(places), recorded(folder, name, "packed_latent_position_ids"))

    counts = [h * w for h, w in latent]
    noise = recorded(folder, name, "noise").split(counts)
    logits = recorded(folder, name, "packed_timesteps").split(counts)
    order = [(q.id, s) for q in laid for s in q.segments if s.kind in (Kind.CLEAN, Kind.NOISED)]
    draws, times = {}, {}
    for (owner, s), eps, t in zip(order, noise, logits, strict=True):
        if s.generated:
            draws[owner, f"noise{s.ordinal}"] = eps
            times[owner, s.ordinal] = shift_time(torch.sigmoid(t[0]), c.times.shift)
    before, made.config = made.config, replace(c, times=Times(times))
    predicted: list[Tensor] = []
    hook = made.latent_out.register_forward_hook(lambda m, i, o: predicted.append(o.detach()))
    losses = made.losses(batch, RecordedNoise(draws))
    hook.remove()
    made.config = before
    means = {k: losses[k].sum / losses[k].count for k in ("text", "image")}
    folder.close(f"{name}: ce", means["text"], meta["ce"])
    folder.close(f"{name}: mse", means["image"], meta["mse"])
    folder.close(f"{name}: total of 1.5 ce", 1.5 * means["text"] + means["image"], meta["total_1_5_ce"])
    gradients(folder, made, name, means["text"] + means["image"], meta)
    noised = bagel.ascending(batch, Kind.NOISED).argsort()
    velocity = torch.cat([p.flatten(0, -2) for p in predicted])[noised]
    out = f"training.{name}.out."
    folder.close(f"{out}velocity", velocity)
    target = torch.cat([e - tokens(made, s) for (_, s), e in zip(order, noise, strict=True) if s.generated])
    folder.close(f"{out}mse_per_token", (velocity - target).square().mean(-1))
    if f"{out}latents" in folder.tensors:
        folder.close(f"{out}latents", torch.stack([s.image for _, s in order]))
    with torch.no_grad():
        folder.close(
            f"{out}ce_per_token", word_losses(made, batch, RecordedNoise(draws), replace(c, times=Times(times)))
        )


def word_losses(made: Bagel, batch: Any, noise: RecordedNoise, config: Config) -> Tensor:
    """The cross-entropy of every supervised word."""
    states: list[Tensor] = []
    hook = made.decoder.register_forward_hook(lambda m, i, o: states.append(o))
    before, made.config = made.config, config
    made.losses(batch, noise)
    hook.remove()
    made.config = before
    rank = bagel.inverse_permutation(torch.cat(batch.routes))
    supervised = (batch.targets != NONE).nonzero()[:, 0]
    logits = made.decoder.logits(states[0][rank[supervised]])
    return F.cross_entropy(logits, batch.targets[supervised], reduction="none")


def gradients(folder: Folder, made: Bagel, name: str, loss: Tensor, meta: dict[str, Any]) -> None:
    """Norms of the recorded gradients."""
    made.zero_grad()
    loss.backward()
    ours = bagel.export(bagel.BAGEL, {k: p.grad for k, p in made.named_parameters() if p.grad is not None})
    for key, norm in meta["grad_norms_of_ce_plus_mse"].items():
        folder.close(f"{name}: norm of grad.{key}", ours[key].norm() if key in ours else torch.zeros(()), norm)


def encode(folder: Folder, made: Bagel, name: str, laid: list[Layout]) -> list[Tensor]:
    """Latents of every picture that is encoded, with the recorded posterior noise."""
    images = [s.image for q in laid for s in q.segments if s.kind in (Kind.CLEAN, Kind.NOISED)]
    eps = recorded(folder, name, "vae_eps")
    with torch.no_grad():
        return [
            made.autoencoder.encode(bagel.to_float(image[None]), e[None])[0]
            for image, e in zip(images, eps, strict=True)
        ]


def tokens(made: Bagel, segment: Any) -> Tensor:
    """The latent tokens of a segment."""
    return bagel.latents_to_tokens(segment.image[None], made.config.latent_patch)[0]


class Times(TimeDraw):
    """Gives the recorded time of every noised picture."""

    def __init__(self, times: dict[tuple[str, int], Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "times", times)

    def __call__(self, noise, owners, ordinals):
        return torch.stack([self.times[key] for key in zip(owners, ordinals, strict=True)])


STAGES: dict[str, Callable[[Folder], None]] = {
    "sizes": sizes,
    "runs": runs,
    "said to read": said_to_read,
    "seeds": published_seeds,
    "chains": chains,
    "training": training,
}
"""Every stage in order."""
