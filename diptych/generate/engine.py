"""The engine: messages in, events out. It knows the protocol and no family.

Requests are samples, as in training: ``lay_out`` makes their sequences, ``extend`` reads them, and then either words
are said one by one or pictures are drawn step by step. Lists go through together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from diptych import models
from diptych.core.sample import Image, Message, Sample, Text, assistant, sample_from_json, user
from diptych.core.sequence import Sequence as Laid
from diptych.data.images import open_image
from diptych.generate.events import Answer, Event, ImageDone, ImagePreview, Picture, Pictures, Stop, TextDelta, Usage
from diptych.generate.memory import Memory
from diptych.generate.sampling import next_word
from diptych.models.protocol import Context, Drawing, UnifiedModel
from diptych.parts.images import to_pil

Pixels = str | Path | PIL.Image.Image
Messages = Sequence[Message | Mapping[str, Any]]
Size = tuple[int, int]  # (width, height) in pixels


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
    model = models.load(name_or_path, models.pick_device(device), dtype, base, quantize)
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
        self, messages: Messages, max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> Answer:
        """The answer to a conversation whose last message is the user's."""
        return self.answers([_conversation(messages)], max_new_tokens, temperature, seed, top_p=top_p)[0]

    def ask(
        self, image: Pixels, question: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> Answer:
        """The answer to a question about a picture."""
        return self.chat([user(Image(_open(image)), question)], max_new_tokens, temperature, seed=seed)

    def generate(self, prompt: str, n: int = 1, size: Size | None = None, seed: int = 0, **settings: Any) -> Pictures:
        """``n`` pictures of a prompt, at ``size`` (width, height); settings are the fields of the model's settings."""
        return self._pictures(Sample("prompt", (user(prompt),)), prompt, n, size, seed, settings)

    def edit(
        self,
        images: Pixels | Sequence[Pixels],
        instruction: str,
        n: int = 1,
        size: Size | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Pictures:
        """``n`` edits of one or several pictures; the size is the (last) source's unless given."""
        many = [images] if isinstance(images, (str, Path, PIL.Image.Image)) else list(images)
        if not many:
            raise ValueError("edit needs at least one picture")
        sources = [Image(_open(i), "condition") for i in many]
        return self._pictures(Sample("edit", (user(*sources, instruction),)), instruction, n, size, seed, settings)

    def _pictures(
        self, sample: Sample, prompt: str, n: int, size: Size | None, seed: int, settings: Mapping[str, Any]
    ) -> Pictures:
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        drawn = self.draw([sample] * n, range(seed, seed + n), size, self.settings(settings))
        return Pictures([d.image for d in drawn], prompt, seed, drawn[0].parameters)

    def settings(self, changes: Mapping[str, Any]) -> Any:
        """The model's own settings with ``changes``; a value of None changes nothing. Raises ``ValueError`` for unknown
        names, listing the known."""
        known = asdict(self.model.settings)
        if unknown := sorted(changes.keys() - known.keys()):
            raise ValueError(f"unknown settings {unknown}; known: {', '.join(known)}")
        return replace(self.model.settings, **{k: v for k, v in changes.items() if v is not None})

    # ---- events -------------------------------------------------------------------------------------------------

    def stream(
        self, messages: Messages, max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> Iterator[Event]:
        """The answer as it comes: ``TextDelta`` ... ``Stop``."""
        [laid], [context] = self._read([_conversation(messages)])
        read, generator, said, reason = context.length, torch.Generator().manual_seed(seed), "", "length"
        ids: list[int] = []
        while len(ids) < max_new_tokens:
            word = next_word(context.logits, temperature, top_p, generator)
            if word in self.model.stop_ids:
                reason = "stop"
                break
            ids.append(word)
            text = self.model.tokenizer.decode(ids)
            if len(text) > len(said) and not text.endswith("\ufffd"):  # half a character waits for its other half
                yield TextDelta(text[len(said) :])
                said = text
            if len(ids) < max_new_tokens:
                [context] = self.model.extend([context], [self.model.reply([word])])
        self.memory.keep(laid, ids[: context.length - read], context)  # the last word said need not have been read
        if (text := self.model.tokenizer.decode(ids)) != said:
            yield TextDelta(text[len(said) :])
        parameters = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        yield Stop(reason, Usage(read, len(ids)), parameters)

    def stream_picture(
        self, messages: Messages, size: Size | None = None, seed: int = 0, previews: int = 0, **settings: Any
    ) -> Iterator[Event]:
        """A picture as it sharpens: ``previews`` evenly spread ``ImagePreview``, then ``ImageDone`` and ``Stop``."""
        sample, chosen = _conversation(messages), self.settings(settings)
        drawings, parameters = self._start([sample], [seed], size, [chosen])
        every = max(1, drawings[0].steps // (previews + 1)) if previews else 0
        while not drawings[0].done:
            drawings = self.model.step(drawings)
            if every and drawings[0].step % every == 0 and not drawings[0].done:
                yield ImagePreview(to_pil(self.model.preview(drawings)[0]), drawings[0].step, drawings[0].steps)
        yield ImageDone(to_pil(self.model.finish(drawings)[0]), seed)
        yield Stop("image", Usage(drawings[0].contexts[0].length, 0, 1), parameters[0])

    # ---- many requests ------------------------------------------------------------------------------------------

    def answers(
        self,
        samples: Sequence[Sample],
        max_new_tokens: int = 48,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 32,
        top_p: float = 1.0,
    ) -> list[Answer]:
        """One answer per sample, whose messages end with a user's; ``batch_size`` of them are said together."""
        parameters = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        out: list[Answer] = []
        for at in range(0, len(samples), batch_size):
            laid, contexts = self._read(samples[at : at + batch_size])
            generators = [torch.Generator().manual_seed(seed) for _ in contexts]
            ids: list[list[int]] = [[] for _ in contexts]
            reasons = ["length"] * len(contexts)
            going = list(range(len(contexts)))
            for said in range(max_new_tokens):
                still = []
                for i in going:
                    word = next_word(contexts[i].logits, temperature, top_p, generators[i])
                    if word in self.model.stop_ids:
                        reasons[i] = "stop"
                    else:
                        ids[i].append(word)
                        still.append(i)
                going = still
                if not going or said == max_new_tokens - 1:
                    break
                new = self.model.extend([contexts[i] for i in going], [self.model.reply(ids[i][-1:]) for i in going])
                for i, context in zip(going, new, strict=True):
                    contexts[i] = context
            for i in range(len(contexts))[-self.memory.most :]:
                self.memory.keep(laid[i], ids[i][: contexts[i].length - len(laid[i])], contexts[i])
            decode = self.model.tokenizer.decode
            out += [Answer(decode(w), tuple(w), r, parameters) for w, r in zip(ids, reasons, strict=True)]
        return out

    def draw(
        self,
        samples: Sequence[Sample],
        seeds: Sequence[int],
        size: Size | None = None,
        settings: Any = None,
        batch_size: int = 32,
    ) -> list[Picture]:
        """One picture per sample (its messages end with a user's), each from its own seed; ``size`` is (width, height).
        A picture does not depend on what it was drawn beside."""
        out: list[Picture] = []
        for at in range(0, len(samples), batch_size):
            some = samples[at : at + batch_size]
            chosen = settings or self.model.settings
            drawings, parameters = self._start(some, seeds[at : at + batch_size], size, [chosen] * len(some))
            images: dict[int, PIL.Image.Image] = {}
            groups: dict[tuple, list[int]] = {}
            for i, d in enumerate(drawings):
                groups.setdefault((d.canvas, len(d.contexts)), []).append(i)
            for members in groups.values():
                group = [drawings[i] for i in members]
                while not group[0].done:
                    group = self.model.step(group)
                images |= zip(members, map(to_pil, self.model.finish(group)), strict=True)
            out += [
                Picture(images[i], _words(sample), p["seed"], p)
                for i, (sample, p) in enumerate(zip(some, parameters, strict=True))
            ]
        return out

    def _read(self, samples: Sequence[Sample]) -> tuple[list[Laid], list[Context]]:
        """The requests laid out, and contexts that stand where an answer begins."""
        sequences = [self.model.lay_out(_opened(s, assistant())) for s in samples]
        return sequences, self.memory.read(sequences, [len(s.messages) > 1 for s in samples])

    def _start(
        self, samples: Sequence[Sample], seeds: Sequence[int], size: Size | None, settings: Sequence[Any]
    ) -> tuple[list[Drawing], list[dict]]:
        """Reads the contexts that every branch of guidance needs, each distinct one once, and begins the pictures."""
        contexts: dict[tuple, Context] = {}
        waiting: dict[tuple, Laid] = {}
        branches, canvases, parameters = [], [], []
        for sample, seed, s in zip(samples, seeds, settings, strict=True):
            request = _opened(sample, assistant(Image(None, "target", size)))
            keys = []
            for drop in self.model.branches(request, s):
                if (key := (id(sample), drop)) not in contexts:
                    contexts[key] = self.model.open()
                    if len(laid := self.model.lay_out(request, drop)):
                        waiting[key] = laid
                keys.append(key)
            branches.append(keys)
            canvases.append(canvas := self.model.canvas(request))
            parameters.append({"size": (canvas[1], canvas[0]), "seed": seed, **asdict(s)})
        if waiting:
            later = {id(sample): len(sample.messages) > 1 for sample in samples}
            read = self.memory.read(list(waiting.values()), [later[key[0]] for key in waiting])
            contexts |= zip(waiting, read, strict=True)
        drawings = self.model.start([tuple(contexts[k] for k in b) for b in branches], canvases, settings, list(seeds))
        return drawings, parameters


def _opened(sample: Sample, turn: Message) -> Sample:
    """The sample as a request: an open turn is added to a conversation that ends with the user's message."""
    if sample.is_open:
        return sample
    if not sample.messages or sample.messages[-1].role != "user":
        raise ValueError("a conversation must end with a user's message")
    return replace(sample, messages=(*sample.messages, turn))


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
    return open_image(Path(image), str(image))


def _words(sample: Sample) -> str:
    return " ".join(p.text for p in (sample.request or sample.messages[-1]).parts if isinstance(p, Text))
