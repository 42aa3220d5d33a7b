"""The engine: messages in, events out. It knows the protocol and no family.

Requests are samples, as in training: ``lay_out`` makes their sequences, ``extend`` reads them, and then either words
are said one by one or pictures are drawn step by step. Lists go through the scheduler together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import PIL.Image

from diptych.core.sample import Image, Message, Sample, sample_from_json, user
from diptych.data.decoding import open_picture
from diptych.generation.events import Answer, Event, Picture, Pictures
from diptych.generation.prefix_cache import Memory
from diptych.generation.scheduler import Draw, Job, Say, Scheduler, Size, Sketch, Talk
from diptych.machine import devices
from diptych.models import store
from diptych.models.protocol import UnifiedModel

Pixels = str | Path | PIL.Image.Image
Messages = Sequence[Message | Mapping[str, Any]]


def load(
    name_or_path: str | Path,
    device: str = "auto",
    dtype: str | None = None,
    base: str | Path | None = None,
    quantize: str | None = None,
) -> Engine:
    """A model ready to use: a folder of ours, a run, a published folder, a name that ``diptych models`` lists or an
    ``org/name`` of the hub.

    ``device`` is "auto" (a GPU when there is one), "cpu", "cuda", "mps" ...; ``dtype``, ``base`` and ``quantize`` are
    those of ``models.load``.
    """
    model = store.load(name_or_path, devices.pick_device(device), dtype, base, quantize)
    if not isinstance(model, UnifiedModel):
        raise ValueError(
            f"{name_or_path} is of family {model.family!r}, which can be trained on but neither reads nor draws"
        )
    return Engine(model, str(name_or_path))


class Engine:
    """A model with the loops around it. ``model`` is the network, ``name`` what it was loaded as."""

    def __init__(self, model: UnifiedModel, name: str = "") -> None:
        self.model, self.name = model.eval(), name or model.family
        self.memory = Memory(model)

    # ---- one request --------------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Messages,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        pictures: int = 4,
    ) -> Answer:
        """The answer to a conversation whose last message is the user's, with up to ``pictures`` of the model's own."""
        sample = _conversation(messages)
        return self.answers([sample], max_new_tokens, temperature, seed, top_p=top_p, pictures=pictures)[0]

    def ask(
        self, image: Pixels, question: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> Answer:
        """The answer to a question about a picture."""
        return self.chat([user(Image(_open(image)), question)], max_new_tokens, temperature, seed=seed)

    def generate(
        self,
        prompt: str,
        n: int = 1,
        size: Size | None = None,
        seed: int = 0,
        negative_prompt: str = "",
        **settings: Any,
    ) -> Pictures:
        """``n`` pictures of a prompt, at ``size`` (width, height), guided away from ``negative_prompt``; settings are
        the fields of the model's settings."""
        return self._pictures(Sample("prompt", (user(prompt),)), prompt, n, size, seed, negative_prompt, settings)

    def edit(
        self,
        images: Pixels | Sequence[Pixels],
        instruction: str,
        n: int = 1,
        size: Size | None = None,
        seed: int = 0,
        negative_prompt: str = "",
        **settings: Any,
    ) -> Pictures:
        """``n`` edits of one or several pictures; the size is the (last) source's unless given."""
        many = [images] if isinstance(images, (str, Path, PIL.Image.Image)) else list(images)
        if not many:
            raise ValueError("edit needs at least one picture")
        sources = [Image(_open(i), "condition") for i in many]
        sample = Sample("edit", (user(*sources, instruction),))
        return self._pictures(sample, instruction, n, size, seed, negative_prompt, settings)

    def _pictures(
        self,
        sample: Sample,
        prompt: str,
        n: int,
        size: Size | None,
        seed: int,
        negative_prompt: str,
        settings: Mapping[str, Any],
    ) -> Pictures:
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        chosen = self.settings(settings, sample)
        drawn = self.draw([sample] * n, range(seed, seed + n), size, chosen, negative_prompt=negative_prompt)
        return Pictures([d.image for d in drawn], prompt, seed, drawn[0].parameters)

    def settings(self, changes: Mapping[str, Any], sample: Sample | None = None) -> Any:
        """The model's own settings (those that suit the request ``sample``, where one is given) with ``changes``; a
        value of None changes nothing. Raises ``ValueError`` for unknown names, listing the known."""
        own = self.model.defaults(sample) if sample else self.model.settings
        known = asdict(own)
        if unknown := sorted(changes.keys() - known.keys()):
            raise ValueError(f"unknown settings {unknown}; known: {', '.join(known)}")
        return replace(own, **{k: v for k, v in changes.items() if v is not None})

    # ---- events -------------------------------------------------------------------------------------------------

    def stream(
        self, messages: Messages, max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> Iterator[Event]:
        """The answer as it comes: ``TextDelta`` ... ``Stop``, and an ``ImageDone`` for every picture that it holds."""
        return self._events(Say(_conversation(messages), max_new_tokens, temperature, top_p, seed))

    def stream_picture(
        self,
        messages: Messages,
        size: Size | None = None,
        seed: int = 0,
        previews: int = 0,
        negative_prompt: str = "",
        **settings: Any,
    ) -> Iterator[Event]:
        """A picture as it sharpens: ``previews`` evenly spread ``ImagePreview``, then ``ImageDone`` and ``Stop``."""
        sample = _conversation(messages)
        return self._events(Draw(sample, seed, size, self.settings(settings, sample), negative_prompt, previews))

    def _events(self, request: Say | Draw) -> Iterator[Event]:
        loop = Scheduler(self.model, self.memory, 1)
        loop.submit(request)
        while not loop.idle:
            yield from (event for _, event in loop.tick())

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
    ) -> list[Answer]:
        """One answer per sample, whose messages end with a user's; ``batch_size`` of them are said together."""
        asked = [Say(s, max_new_tokens, temperature, top_p, seed, pictures=pictures) for s in samples]
        decode = self.model.tokenizer.decode
        return [
            Answer(decode(j.ids), tuple(j.ids), str(j.reason), j.parameters, j.images)
            for j in self._run(asked, batch_size)
            if isinstance(j, Talk)
        ]

    def draw(
        self,
        samples: Sequence[Sample],
        seeds: Sequence[int],
        size: Size | None = None,
        settings: Any = None,
        batch_size: int = 32,
        negative_prompt: str = "",
    ) -> list[Picture]:
        """One picture per sample (its messages end with a user's), each from its own seed; ``size`` is (width, height);
        without ``settings`` each has what suits it. A picture does not depend on what it was drawn beside."""
        requests = [
            Draw(s, seed, size, settings or self.model.defaults(s), negative_prompt)
            for s, seed in zip(samples, seeds, strict=True)
        ]
        jobs = self._run(requests, batch_size)
        return [
            Picture(j.image, j.request.sample.prompt, j.request.seed, j.parameters)
            for j in jobs
            if isinstance(j, Sketch) and j.image
        ]

    def _run(self, requests: Sequence[Say | Draw], slots: int) -> list[Job]:
        loop = Scheduler(self.model, self.memory, slots)
        jobs = [loop.submit(request) for request in requests]
        while not loop.idle:
            loop.tick()
        return jobs


def _conversation(messages: Messages) -> Sample:
    """The request as a sample with its pictures opened."""
    parsed = []
    for m in messages:
        parsed.append(m if isinstance(m, Message) else sample_from_json({"messages": [m]}).messages[0])
    return Sample("request", tuple(parsed)).map_images(lambda i: replace(i, image=_open(i.image)))


def _open(image: Pixels | None) -> PIL.Image.Image:
    if isinstance(image, PIL.Image.Image):
        return image.convert("RGB")
    if image is None:
        raise ValueError("a picture of the conversation has no pixels")
    return open_picture(Path(image), str(image))
