"""Chat completions: a conversation answered in OpenAI's shape."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import PIL.Image

from diptych.core.sample import Image, Sample, assistant
from diptych.generation.events import Event, ImageDone, ImagePreview, Stop, TextDelta, Usage, Word
from diptych.generation.scheduler import Draw, Say
from diptych.serving.pictures import data_uri
from diptych.serving.schemas import ChatRequest
from diptych.serving.service import Service, _seed, _size
from diptych.serving.stream import _sse
from diptych.serving.worker import Call, Worker

# ---- chat ---------------------------------------------------------------------------------------------------------


class Conversation:
    """The answers to a chat: ``n`` choices, each made of the modalities asked for, one after another."""

    def __init__(self, service: Service, worker: Worker, body: ChatRequest, sample: Sample) -> None:
        s, self.body, self.worker = service, body, worker
        self.id, self.created, self.seed = f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), _seed(body)
        wanted = body.max_tokens or body.max_completion_tokens or min(256, s.limits.new_tokens)
        if wanted > s.limits.new_tokens:
            raise ValueError(f"max_tokens may be at most {s.limits.new_tokens}, not {wanted}")
        if body.n > s.limits.n:
            raise ValueError(f"n may be at most {s.limits.n}, not {body.n}")
        for stop in body.stops:
            s.text(stop, "stop")
        self.wanted = wanted
        self.settings = s.settings(worker.engine, body, sample) if "image" in body.modalities else None
        self.negative = s.text(body.negative_prompt or "", "negative_prompt")
        self.turns = [sample] * body.n
        self.parts: list[list[dict[str, Any]]] = [[] for _ in range(body.n)]
        self.reasons, self.words = ["stop"] * body.n, [list[dict]() for _ in range(body.n)]
        self.owner: list[int] = []  # choice of each request submitted
        self.usage = Usage()
        self.parameters: dict[str, Any] = {"n": body.n, "modalities": body.modalities, "seed": self.seed}

    def begin(self, call: Call) -> None:
        first = self._next(0, self.turns[0])
        assert first
        if self.settings:
            self.worker.prepare(self._drawing(0, self.turns[0]))  # what could not be drawn is told now, not after words
        self.owner = list(range(self.body.n))
        call.submit(*(replace(first, seed=self.seed + i) for i in range(self.body.n)))

    def _next(self, choice: int, turn: Sample) -> Say | Draw | None:
        """The request for the choice's next part."""
        b, done = self.body, len(self.parts[choice])
        if done == len(b.modalities):
            return None
        if b.modalities[done] == "image":
            return self._drawing(choice, turn)
        logprobs = (b.top_logprobs or 0) if b.logprobs else None
        opened = replace(turn, messages=(*turn.messages, assistant()))
        return Say(opened, self.wanted, b.temperature, b.top_p, self.seed + choice, b.stops, logprobs, pictures=0)

    def _drawing(self, choice: int, turn: Sample) -> Draw:
        b = self.body
        opened = replace(turn, messages=(*turn.messages, assistant(Image(None, "target", _size(b.size)))))
        return Draw(opened, self.seed + choice, None, self.settings, self.negative, b.partial_images)

    async def follow(self, call: Call) -> AsyncIterator[tuple[int, Event]]:
        """Events with their choice; what has been said and drawn is kept in ``parts``."""
        said = [""] * self.body.n
        drawn: list[PIL.Image.Image | None] = [None] * self.body.n
        async for number, event in call.follow():
            choice = self.owner[number]
            if isinstance(event, TextDelta):
                said[choice] += event.text
                self.words[choice] += map(_logprob, event.words)
            if isinstance(event, ImageDone):
                drawn[choice] = event.image
            if isinstance(event, Stop):
                image, turn = drawn[choice], self.turns[choice]
                if event.reason == "image":
                    assert image
                    url = await asyncio.to_thread(data_uri, image)
                    self.parts[choice].append({"type": "image_url", "image_url": {"url": url}})
                    self.parameters["image"] = dict(event.parameters) | {"seed": self.seed}
                    message = assistant(Image(image, "target"))
                else:
                    self.parts[choice].append({"type": "text", "text": said[choice]})
                    self.reasons[choice] = event.reason
                    told = dict(event.parameters)
                    told["max_tokens"] = told.pop("max_new_tokens")
                    self.parameters |= told | {"stop": self.body.stops, "seed": self.seed}
                    message = assistant(said[choice])
                said[choice] = ""
                u, more = self.usage, event.usage
                self.usage = Usage(u.read + more.read, u.written + more.written, u.pictures + more.pictures)
                self.turns[choice] = replace(turn, messages=(*turn.messages, message))
                if following := self._next(choice, self.turns[choice]):
                    self.owner.append(choice)
                    call.submit(following)
            yield choice, event

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.worker.engine.name}

    def counted(self) -> dict[str, Any]:
        u = self.usage
        return {
            "prompt_tokens": u.read,
            "completion_tokens": u.written,
            "total_tokens": u.read + u.written,
            "pictures": u.pictures,
        }

    async def whole(self, call: Call) -> dict[str, Any]:
        """The answer at once."""
        async for _ in self.follow(call):
            pass
        choices = []
        for i, parts in enumerate(self.parts):
            plain = self.body.modalities == ["text"]
            message = {"role": "assistant", "content": parts[0]["text"] if plain else parts, "refusal": None}
            logprobs = {"content": self.words[i], "refusal": None} if self.body.logprobs else None
            choices.append({"index": i, "message": message, "logprobs": logprobs, "finish_reason": self.reasons[i]})
        head = self.head("chat.completion")
        return head | {"choices": choices, "usage": self.counted(), "parameters": self.parameters}

    async def pieces(self, call: Call) -> AsyncIterator[str]:
        """The answer as it comes, as server-sent events."""

        def chunk(i: int, delta: dict, logprobs: Any = None, reason: str | None = None, **more: Any) -> str:
            choice = {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return _sse(self.head("chat.completion.chunk") | {"choices": [choice]} | more)

        for i in range(self.body.n):
            yield chunk(i, {"role": "assistant", "content": ""})
        async for i, event in self.follow(call):
            if isinstance(event, TextDelta):
                logprobs = {"content": [_logprob(w) for w in event.words]} if self.body.logprobs else None
                yield chunk(i, {"content": event.text}, logprobs)
            elif isinstance(event, ImagePreview):
                url = await asyncio.to_thread(data_uri, event.image)
                yield chunk(i, {"preview": {"url": url, "step": event.step, "of": event.of}})
            elif isinstance(event, Stop):
                if event.reason == "image":
                    yield chunk(i, {"content": [self.parts[i][-1]]})
                if len(self.parts[i]) == len(self.body.modalities):
                    yield chunk(i, {}, None, self.reasons[i], parameters=self.parameters)
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield _sse(self.head("chat.completion.chunk") | {"choices": [], "usage": self.counted()})
        yield "data: [DONE]\n\n"


def _logprob(word: Word) -> dict[str, Any]:
    def one(text: str, value: float) -> dict[str, Any]:
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    return one(word.text, word.logprob) | {"top_logprobs": [one(*likely) for likely in word.likeliest]}
