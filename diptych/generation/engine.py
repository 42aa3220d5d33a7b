"""The engine: messages in, events out. It knows the protocol and no family.

A request is a sample, as in training: ``lay_out`` turns it into segments and ``extend`` reads them (prefill). Then the
answer is decoded token by token, or the picture is denoised step by step. The scheduler batches requests.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from diptych.core.errors import nearest
from diptych.core.sample import Image, Message, Sample, sample_from_json, user
from diptych.data.decoding import PictureSource, open_mask, open_picture
from diptych.generation.events import Answer, Event, Picture, Pictures
from diptych.generation.prefix_cache import PrefixCache
from diptych.generation.sampling import Penalties
from diptych.generation.scheduler import ImageJob, ImageRequest, Job, Scheduler, Size, TextJob, TextRequest
from diptych.generation.thinking import Think, split
from diptych.machine import devices
from diptych.models import store
from diptych.models.protocol import S, Settings, UnifiedModel
from diptych.models.sizes import Sizes, parse_size
from diptych.parts.images import keep_outside

if TYPE_CHECKING:
    import PIL.Image
    import torch

Messages = str | Sequence[Message | Mapping[str, Any]]
Prompt = str | Sequence[str]
Seed = int | None  # None: a random one, which the result holds
OnStep = Callable[[int, int], None]  # called with (steps done, steps in all), summed over the pictures
SizeLike = int | str | Sequence[int]  # 64, "64x48" or (64, 48): width, then height
ALIASES = {  # names in other libraries -> the argument here
    "height": "size=(width, height)",
    "width": "size=(width, height)",
    "num_images_per_prompt": "n",
    "num_images": "n",
    "generator": "seed",
    "steps": "num_inference_steps",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
}


MODEL_CARD = """---
library_name: diptych
pipeline_tag: any-to-any
tags:
- diptych
- {family}
---

# {name}

A model of the family {family} with {millions:.1f} M parameters. It generates and edits pictures of {width}x{height}
pixels and answers questions about pictures.

```python
import diptych

model = diptych.load("{name}")
model.generate("a red circle", seed=0)[0].save("picture.png")
```

{text}"""


def load(
    name_or_path: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    base: str | Path | None = None,
    quantize: str | None = None,
    preset: str = "",
    config: Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> Engine:
    """A model ready to use: a folder of ours, a run, a published folder, a name that ``diptych models`` lists or an
    ``org/name`` of the hub (``revision`` is a branch, a tag or a commit there).

    ``device`` is "auto" (a GPU when there is one), "cpu", "cuda", "mps" or a ``torch.device``; ``dtype``, ``base`` and
    ``quantize`` are those of ``diptych.models.store.load``. ``preset`` names a published entry point, whose settings
    become the model's own (``model.presets``); ``config`` changes leaves of the model's config, such as
    ``{"reading": "scripts"}``.
    """
    changes = dict(config or {})
    if preset:
        family: Any = store.family_of(name_or_path, base, revision)
        changes = {**family.preset(preset).config, **changes}
    model = store.load(
        name_or_path, devices.pick_device(str(device)), dtype, base, quantize, changes=changes, revision=revision
    )
    if not isinstance(model, UnifiedModel):
        raise ValueError(
            f"{name_or_path} is of family {model.family!r}, which can be trained but neither answers nor draws"
        )
    if preset:
        draw, edit = (replace(model.settings, **getattr(model.preset(preset), kind)) for kind in ("draw", "edit"))
        model.settings, model.edits = draw, edit
    return Engine(model, str(name_or_path), preset)


@dataclass(frozen=True)
class Way:
    """How the pictures of a call are drawn."""

    negative_prompt: str = ""
    think: bool | Think = False
    preset: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    on_step: OnStep | None = None


class Engine:
    """A model with the loops around it. ``model`` is the network, ``name`` what it was loaded as.

    A picture argument is a path, the bytes of a file, a file object, a data URI, a ``PIL.Image``, a numpy array or a
    tensor (``diptych.data.decoding.open_picture``), or a ``Picture`` that a model generated."""

    def __init__(self, model: UnifiedModel, name: str = "", preset: str = "") -> None:
        self.model, self.name, self.preset = model.eval(), name or model.family, preset
        self.prefixes = PrefixCache(model)

    def __repr__(self) -> str:
        parameters = list(self.model.parameters())
        millions = sum(p.numel() for p in parameters) / 1e6
        dtype = str(self.dtype).removeprefix("torch.")
        width, height = self.sizes.default
        return f"Engine({self.name!r}, {millions:.1f} M parameters, {width}x{height} pixels, {dtype} on {self.device})"

    @property
    def sizes(self) -> Sizes:
        """The sizes of pictures that the model was trained on; requests for others are refused."""
        return self.model.config.trained

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's parameters, of the first where they differ."""
        return next(self.model.parameters()).dtype

    def to(self, device: str | torch.device) -> Engine:
        """Moves the model to a device, in place, and returns the engine. Raises ``ValueError`` as ``load``."""
        self.model.to(devices.pick_device(str(device)))
        self.prefixes = PrefixCache(self.model)  # the cached contexts are on the old device
        return self

    # ---- storage ------------------------------------------------------------------------------------------------

    from_pretrained = staticmethod(load)

    def save_pretrained(self, folder: str | Path, force: bool = False) -> Path:
        """Writes config.json, model.safetensors and tokenizer.json, which ``load`` reads, and returns the folder.

        Raises ``ValueError`` for a folder with files that diptych did not write, unless ``force`` overwrites the files
        of the same names, and for a quantized model."""
        return store.save(self.model, folder, force=force)

    def push_to_hub(
        self,
        repository: str,
        card: str = "",
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a model of diptych",
        token: str | None = None,
    ) -> str:
        """Uploads the model to ``org/name`` of the Hugging Face hub in one commit and returns the commit's address.

        The repository is created where it does not exist (``private`` as given, by default as the organization's).
        README.md is the model card: how to load the model, then the text ``card``, such as
        ``diptych.evaluation.model_card.scores(FOLDER)``. ``token`` defaults to the one of ``hf auth login``. Raises the
        hub's errors."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as parent:
            folder = self.save_pretrained(Path(parent) / "model")
            (folder / "README.md").write_text(self._card(name, card), "utf-8")
            return str(
                api.upload_folder(
                    repo_id=name, folder_path=folder, commit_message=commit_message, revision=revision
                ).commit_url
            )

    def _card(self, name: str, text: str) -> str:
        """The model card, with the hub's metadata."""
        width, height = self.sizes.default
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        return MODEL_CARD.format(
            name=name, family=self.model.family, millions=millions, width=width, height=height, text=text
        )

    # ---- one request --------------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Messages,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: Seed = 0,
        pictures: int = 4,
        think: bool = False,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
    ) -> Answer:
        """The answer to a conversation whose last message is the user's, with up to ``pictures`` of the model's own.
        With ``think`` the model is asked to reason first; what it writes in ``<think>`` tags is ``Answer.reasoning``.

        A message is a ``Message`` or a mapping of ``role`` and ``content``, whose picture parts are
        ``{"type": "image", "image": PICTURE}`` or OpenAI's ``{"type": "image_url", "image_url": {"url": DATA_URI}}``. A
        string is one message of the user."""
        sample = self._conversation(messages)
        request = TextRequest(sample, max_new_tokens, temperature, top_p, _seed(seed), pictures=pictures, think=think)
        return self._answers([replace(request, top_k=top_k, penalties=Penalties(repetition_penalty))], 1)[0]

    def ask(
        self,
        image: PictureSource | Picture,
        question: str,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: Seed = 0,
        top_p: float = 1.0,
        think: bool = False,
    ) -> Answer:
        """The answer to a question about a picture; ``think`` as in ``chat``."""
        message = user(Image(_pixels(image)), _text(question, "question"))
        return self.chat([message], max_new_tokens, temperature, top_p, seed, think=think)

    @overload
    def generate(
        self,
        prompt: str,
        n: int = 1,
        size: SizeLike | None = None,
        seed: Seed = 0,
        negative_prompt: str = "",
        think: bool | Think = False,
        preset: str = "",
        **settings: Any,
    ) -> Pictures: ...

    @overload
    def generate(
        self,
        prompt: Sequence[str],
        n: int = 1,
        size: SizeLike | None = None,
        seed: Seed = 0,
        negative_prompt: str = "",
        think: bool | Think = False,
        preset: str = "",
        **settings: Any,
    ) -> list[Pictures]: ...

    def generate(
        self,
        prompt: Prompt,
        n: int = 1,
        size: SizeLike | None = None,
        seed: Seed = 0,
        negative_prompt: str = "",
        think: bool | Think = False,
        preset: str = "",
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Pictures | list[Pictures]:
        """``n`` pictures of a prompt, or of each of a list of prompts, which are drawn in one batch.

        ``size`` is (width, height) in pixels, "64x48" or one number for a square; it must be one of ``sizes``. Picture
        i of a prompt has the seed ``seed + i``; a seed of None is random. Guidance moves away from
        ``negative_prompt``. With ``think`` the model first writes a plan (``Pictures.reasoning``) and draws from it; a
        ``Think`` says how. ``preset`` names settings of ``model.presets``, and ``settings`` are fields of
        ``model.settings`` that change them. ``on_step`` is called after every denoising step, for a progress bar."""
        if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Iterable):
            raise ValueError(f"prompt must be a text or a list of texts, not {type(prompt).__name__}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        samples = [Sample("prompt", (user(_text(p, "prompt")),)) for p in prompts]
        drawn = self._pictures(samples, n, size, seed, Way(negative_prompt, think, preset, settings, on_step))
        return drawn[0] if isinstance(prompt, str) else drawn

    def edit(
        self,
        images: PictureSource | Picture | Pictures | list | tuple,
        instruction: str,
        n: int = 1,
        size: SizeLike | None = None,
        seed: Seed = 0,
        negative_prompt: str = "",
        think: bool | Think = False,
        preset: str = "",
        mask: PictureSource | None = None,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Pictures:
        """``n`` edits of one picture or of several together. ``size`` defaults to the trained size nearest to that of
        the last edit source; the other arguments are those of ``generate``.

        With ``mask`` the first source is kept where the mask is black, or opaque where it has transparency
        (``diptych.data.decoding.open_mask``). Raises ``ValueError`` for a mask of another size."""
        many = list(images) if isinstance(images, list | tuple | Pictures) else [images]
        if not many:
            raise ValueError("edit needs at least one picture")
        sources = [Image(_pixels(image), "condition") for image in many]
        sample = Sample("edit", (user(*sources, _text(instruction, "instruction")),))
        region = None if mask is None else open_mask(mask)
        if region and region.size != (first := sources[0].pixels).size:
            raise ValueError(
                f"mask is {region.width}x{region.height} and the first picture {first.width}x{first.height}"
            )
        way = Way(negative_prompt, think, preset, settings, on_step)
        pictures = self._pictures([sample], n, size, seed, way)[0]
        if region is None:
            return pictures
        return replace(pictures, images=[keep_outside(region, sources[0].pixels, i) for i in pictures.images])

    def _pictures(
        self,
        samples: Sequence[Sample],
        n: int,
        size: SizeLike | None,
        seed: Seed,
        way: Way,
    ) -> list[Pictures]:
        """``n`` pictures of each sample, drawn in one batch; the samples are of one kind (all edits, or none)."""
        if not isinstance(n, int) or isinstance(n, bool):
            raise ValueError(f"n must be a whole number, not {n!r}")
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        if not samples:
            return []
        for sample in samples:
            self._warn(sample)
        first, chosen = _seed(seed), self.settings(way.changes, samples[0], way.preset)
        canvas = None if size is None else parse_size(size)
        seeds = [*range(first, first + n)] * len(samples)
        requests = [sample for sample in samples for _ in range(n)]
        negative, think = _text(way.negative_prompt, "negative_prompt"), self.thinking(way.think, way.preset)
        drawn = self.draw(requests, seeds, canvas, chosen, negative_prompt=negative, think=think, on_step=way.on_step)
        return [
            Pictures(
                [d.image for d in group],
                sample.prompt,
                first,
                group[0].parameters,
                tuple(d.reasoning for d in group) if think else (),
                self.name,
            )
            for sample, group in ((s, drawn[i * n : (i + 1) * n]) for i, s in enumerate(samples))
        ]

    def settings(self, changes: Mapping[str, Any], sample: Sample | None = None, preset: str = "") -> Settings:
        """The model's default settings for the request ``sample``, or those of ``preset``, with ``changes`` applied. A
        value of None changes nothing. Raises ``ValueError`` for unknown names, listing the known ones, and for values
        that are not numbers where the setting is a number."""
        return changed(self.model.defaults(sample, preset), changes)

    def thinking(self, think: bool | Think, preset: str = "") -> Think | None:
        """How a plan is generated: as ``think`` says, where it is True as ``preset`` does."""
        if think is True and (named := preset or self.preset):
            return Think(*self.model.preset(named).plan)
        return Think.of(think)

    # ---- events -------------------------------------------------------------------------------------------------

    def stream(
        self,
        messages: Messages,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: Seed = 0,
        think: bool = False,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
    ) -> Iterator[Event]:
        """The events of an answer: ``TextDelta`` ... ``Stop``, an ``ImageDone`` for every picture in it, and with
        ``think`` ``ReasoningDelta`` before them."""
        request = TextRequest(
            self._conversation(messages), max_new_tokens, temperature, top_p, _seed(seed), think=think, top_k=top_k
        )
        return self._events(replace(request, penalties=Penalties(repetition_penalty)))

    def stream_picture(
        self,
        messages: Messages,
        size: SizeLike | None = None,
        seed: Seed = 0,
        previews: int = 0,
        negative_prompt: str = "",
        think: bool | Think = False,
        preset: str = "",
        **settings: Any,
    ) -> Iterator[Event]:
        """The events of a picture: ``previews`` evenly spread ``ImagePreview``, then ``ImageDone`` and ``Stop``. With
        ``think`` the plan comes first, as ``ReasoningDelta``; ``preset`` is that of ``generate``."""
        sample = self._conversation(messages)
        canvas, chosen = None if size is None else parse_size(size), self.settings(settings, sample, preset)
        budget = self.thinking(think, preset)
        return self._events(ImageRequest(sample, _seed(seed), canvas, chosen, negative_prompt, previews, budget))

    def _events(self, request: TextRequest | ImageRequest) -> Iterator[Event]:
        scheduler = Scheduler(self.model, self.prefixes, 1)
        scheduler.submit(request)
        while not scheduler.idle:
            yield from (event for _, event in scheduler.tick())

    # ---- many requests ------------------------------------------------------------------------------------------

    def answers(
        self,
        samples: Sequence[Sample],
        max_new_tokens: int = 48,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 32,
        top_p: float = 1.0,
        pictures: int = 0,
        think: bool = False,
    ) -> list[Answer]:
        """One answer per sample, whose last message is the user's; ``batch_size`` of them are decoded together."""
        options: dict[str, Any] = {"pictures": pictures, "think": think}
        return self._answers(
            [TextRequest(s, max_new_tokens, temperature, top_p, seed, **options) for s in samples], batch_size
        )

    def _answers(self, requests: Sequence[TextRequest], batch_size: int) -> list[Answer]:
        jobs = [j for j in self._run(requests, batch_size) if isinstance(j, TextJob)]
        texts = [self.model.spoken(j.ids) for j in jobs]
        spoken = [split(text) if j.request.think else ("", text) for j, text in zip(jobs, texts, strict=True)]
        return [
            Answer(text, tuple(j.ids), str(j.reason), j.parameters, j.images, reasoning, j.sources)
            for j, (reasoning, text) in zip(jobs, spoken, strict=True)
        ]

    def draw(
        self,
        samples: Sequence[Sample],
        seeds: Sequence[int],
        size: Size | None = None,
        settings: Settings | None = None,
        batch_size: int = 32,
        negative_prompt: str = "",
        think: Think | None = None,
        on_step: OnStep | None = None,
    ) -> list[Picture]:
        """One picture per sample, whose last message is the user's, each with its own seed; ``size`` is (width,
        height) in pixels.

        Without ``settings`` each request uses the model's defaults for its kind (a prompt or an edit). Drawing is
        batch-invariant: a picture does not depend on the others in its batch."""
        requests = [
            ImageRequest(s, seed, size, settings or self.model.defaults(s), negative_prompt, think=think)
            for s, seed in zip(samples, seeds, strict=True)
        ]
        jobs = self._run(requests, batch_size, on_step)
        return [
            Picture(j.image, j.request.sample.prompt, j.request.seed, j.parameters, j.plan or "", self.name)
            for j in jobs
            if isinstance(j, ImageJob) and j.image
        ]

    def _run(
        self, requests: Sequence[TextRequest | ImageRequest], slots: int, on_step: OnStep | None = None
    ) -> list[Job]:
        scheduler = Scheduler(self.model, self.prefixes, slots)
        jobs = [scheduler.submit(request) for request in requests]
        while not scheduler.idle:
            scheduler.tick()
            drawings = [j.drawing for j in jobs if isinstance(j, ImageJob) and j.drawing]
            if on_step and drawings:
                on_step(sum(d.step for d in drawings), len(jobs) * drawings[0].steps)
        return jobs

    # ---- requests -----------------------------------------------------------------------------------------------

    def _conversation(self, messages: Messages) -> Sample:
        """The request as a sample with its pictures opened; warns of shapes that the model was not trained on."""
        if isinstance(messages, str):
            messages = [user(_text(messages, "message"))]
        parsed = tuple(m if isinstance(m, Message) else _message(m, f"messages[{i}]") for i, m in enumerate(messages))
        sample = Sample("request", parsed).map_images(_opened)
        self._warn(sample)
        return sample

    def _warn(self, sample: Sample) -> None:
        for remark in self.sizes.remarks(sample):
            warnings.warn(remark, stacklevel=4)


def changed(settings: S, changes: Mapping[str, Any]) -> S:
    """The settings with ``changes`` applied. A value of None changes nothing. Raises ``ValueError`` for unknown names,
    listing the known ones, and for values that are not numbers where the setting is a number."""
    known = asdict(settings)
    if unknown := sorted(changes.keys() - known.keys()):
        hint = f"; use {ALIASES[unknown[0]]}" if unknown[0] in ALIASES else nearest(unknown[0], known)
        raise ValueError(f"unknown settings {unknown}; known: {', '.join(known)}{hint}")
    given = {k: v for k, v in changes.items() if v is not None}
    for name, value in given.items():
        wanted = type(known[name])
        kinds = {int: (Integral, "a whole number"), float: (Real, "a number")}.get(wanted)
        if kinds and (isinstance(value, bool) or not isinstance(value, kinds[0])):
            raise ValueError(f"{name} must be {kinds[1]}, not {value!r}")
    return replace(settings, **given)


def _message(row: Any, where: str) -> Message:
    """A message of JSON's shape whose pictures may be anything that ``open_picture`` takes."""
    pictures: list[Any] = []

    def held(part: Any) -> Any:
        if isinstance(part, Mapping) and part.get("type") == "image_url":
            url = part.get("image_url")
            part = {"type": "image", "image": url.get("url") if isinstance(url, Mapping) else url}
        if not isinstance(part, Mapping) or part.get("type") != "image" or part.get("image") is None:
            return part
        pictures.append(part["image"])
        return {**part, "image": str(len(pictures) - 1)}

    if isinstance(row, Mapping) and isinstance(row.get("content"), list | tuple):
        row = {**row, "content": [held(part) for part in row["content"]]}
    try:
        sample = sample_from_json({"messages": [row]})
    except ValueError as error:
        raise ValueError(str(error).replace("messages[0]", where)) from error
    return sample.map_images(lambda i: replace(i, image=_pixels(pictures[int(str(i.image))]))).messages[0]


def _opened(image: Image) -> Image:
    if image.image is None:
        raise ValueError("a picture of the conversation has no pixels")
    return replace(image, image=open_picture(image.image))


def _pixels(source: PictureSource | Picture) -> PIL.Image.Image:
    """The pixels of a picture argument."""
    return open_picture(source.image if isinstance(source, Picture) else source)


def _seed(seed: Seed) -> int:
    """The seed, or a random one. Raises ``ValueError`` for anything but a whole number of at least 0."""
    if seed is None:
        return random.SystemRandom().randrange(2**31)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed must be a whole number of at least 0, or None for a random one, not {seed!r}")
    return seed


def _text(text: Any, name: str) -> str:
    """The text. Raises ``ValueError`` for another type, and for a text with half of a surrogate pair (not UTF-8)."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} cannot be encoded as UTF-8: {error.reason}") from error
    return text
