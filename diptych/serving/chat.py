"""``/v1/chat/completions``: conversations answered with text, pictures or both."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Literal

import PIL.Image
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from diptych.core.sample import Image, ImageRole, Message, Sample, Text, assistant
from diptych.generation.events import (
    Event,
    ImageDone,
    ImagePreview,
    ReasoningDelta,
    Stop,
    TextDelta,
    TokenLogprob,
    Usage,
)
from diptych.generation.scheduler import ImageRequest, TextRequest
from diptych.parts.images import data_uri
from diptych.serving.schemas import ChatMessage, ChatRequest, TextPart
from diptych.serving.service import Service, seed_of
from diptych.serving.sse import EventStream, server_sent
from diptych.serving.worker import Call, Worker

_ROLES: dict[str, Literal["system", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "assistant": "assistant",
}  # all others: user


def router(service: Service) -> APIRouter:
    """The endpoint of chats."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def completions(request: Request, body: ChatRequest) -> Response:
        """Text, pictures or both, in answer to a conversation that may show pictures."""
        worker = service.worker(body.model)
        sample = await conversation(service, body)
        chat, headers = Chat(service, worker, body, sample), service.warnings(worker, body, sample)
        call = service.begin(request, worker, chat.submit, body, str(body.messages[-1].content)[:1000])
        if body.stream:
            return EventStream(call, chat.events(call), headers)
        try:
            return JSONResponse(await chat.answer(call), headers=headers)
        finally:
            call.end()

    return routes


async def conversation(service: Service, body: ChatRequest) -> Sample:
    """The messages as a sample. Pictures of the last message are edit sources where a picture is to be drawn.

    Raises ``ValueError`` for texts and pictures that are too many, too large or unreadable."""
    if _ROLES.get(body.messages[-1].role, "user") != "user":
        raise ValueError(f"messages: the last message must be the user's, not the {body.messages[-1].role}'s")
    messages, pictures, length = [], 0, 0
    for i, message in enumerate(body.messages):
        parts: list[Text | Image] = []
        for j, part in enumerate(_parts(message)):
            name = f"messages[{i}].content[{j}]"
            if isinstance(part, TextPart):
                length += len(part.text)
                parts.append(Text(service.text(part.text, name)))
                continue
            pictures += 1
            if pictures > service.limits.pictures:
                raise ValueError(f"{name}: at most {service.limits.pictures} pictures in a conversation")
            url = part.image_url.url if part.type == "image_url" else part.file.file_id
            edited = message is body.messages[-1] and "image" in body.modalities
            role: ImageRole = "target" if message.role == "assistant" else "condition" if edited else "understand"
            parts.append(Image(await service.picture(url, name), role))
        messages.append(Message(_ROLES.get(message.role, "user"), tuple(parts)))
    service.text("x" * length, "the conversation")
    return Sample("request", tuple(messages))


def _parts(message: ChatMessage) -> list[Any]:
    """The parts of a message, whose content may also be a text, or nothing."""
    if isinstance(message.content, list):
        return message.content
    return [TextPart(type="text", text=message.content or "")]


class Chat:
    """``n`` choices in answer to a conversation, each made of the modalities asked for, one after another."""

    def __init__(self, service: Service, worker: Worker, body: ChatRequest, sample: Sample) -> None:
        self.body, self.worker = body, worker
        self.id, self.created, self.seed = f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), seed_of(body)
        if body.n > service.limits.n:
            raise ValueError(f"n may be at most {service.limits.n}, not {body.n}")
        for stop in body.stops:
            service.text(stop, "stop")
        self.max_tokens = min(body.one_of("max_tokens", "max_completion_tokens") or 256, service.limits.new_tokens)
        self.settings = service.settings(worker.engine, body, sample) if "image" in body.modalities else None
        self.negative_prompt = service.text(body.negative_prompt or "", "negative_prompt")
        self.samples = [sample] * body.n  # the conversation of each choice, with what it has answered so far
        self.parts: list[list[dict[str, Any]]] = [[] for _ in range(body.n)]  # of the answers
        self.reasons = ["stop"] * body.n
        self.reasoning = [""] * body.n
        self.think = service.thinking(worker.engine, body, body.thinks)
        self.logprobs = [list[dict[str, Any]]() for _ in range(body.n)]
        self.choices: list[int] = []  # the choice of each request submitted
        self.usage = Usage()
        self.parameters: dict[str, Any] = {"n": body.n, "modalities": body.modalities, "seed": self.seed}

    def submit(self, call: Call) -> None:
        """Queues the first part of each choice. Raises ``ValueError`` also for a later picture that cannot be drawn."""
        first = self._next_request(0)
        assert first
        if self.settings is not None:
            self.worker.prepare(self._drawing(0))
        self.choices = list(range(self.body.n))
        call.submit(*(replace(first, seed=self.seed + i) for i in self.choices))

    def _next_request(self, choice: int) -> TextRequest | ImageRequest | None:
        """The request for the choice's next part; None where it is complete."""
        body, done = self.body, len(self.parts[choice])
        if done == len(body.modalities):
            return None
        if body.modalities[done] == "image":
            return self._drawing(choice)
        top = (body.top_logprobs or 0) if body.logprobs else None
        sample, seed = self.samples[choice], self.seed + choice
        opened = replace(sample, messages=(*sample.messages, assistant()))
        return TextRequest(
            opened,
            self.max_tokens,
            body.temperature,
            body.top_p,
            seed,
            body.stops,
            top,
            pictures=0,
            think=body.thinks,
            top_k=max(body.top_k, 0),
            penalties=body.penalties,
        )

    def _drawing(self, choice: int) -> ImageRequest:
        body, sample = self.body, self.samples[choice]
        assert self.settings is not None
        picture = assistant(Image(None, "target", body.canvas))
        opened = replace(sample, messages=(*sample.messages, picture))
        return ImageRequest(
            opened, self.seed + choice, None, self.settings, self.negative_prompt, body.partial_images, self.think
        )

    async def _follow(self, call: Call) -> AsyncIterator[tuple[int, Event]]:
        """Events with their choice. The parts they complete are added to ``parts`` first, and the next ones queued."""
        texts = [""] * self.body.n
        images: list[PIL.Image.Image | None] = [None] * self.body.n
        async for number, event in call.follow():
            choice = self.choices[number]
            if isinstance(event, ReasoningDelta):
                self.reasoning[choice] += event.text
            if isinstance(event, TextDelta):
                texts[choice] += event.text
                self.logprobs[choice] += map(_logprob, event.logprobs)
            if isinstance(event, ImageDone):
                images[choice] = event.image
            if isinstance(event, Stop):
                message = await self._complete(choice, event, texts[choice], images[choice])
                texts[choice] = ""
                sample = self.samples[choice]
                self.samples[choice] = replace(sample, messages=(*sample.messages, message))
                if request := self._next_request(choice):
                    self.choices.append(choice)
                    call.submit(request)
            yield choice, event

    async def _complete(self, choice: int, event: Stop, text: str, image: PIL.Image.Image | None) -> Message:
        """Adds a part that has ended to the answer, and returns it as the assistant's message."""
        before, now = self.usage, event.usage
        self.usage = Usage(before.read + now.read, before.written + now.written, before.pictures + now.pictures)
        if event.reason == "image":
            assert image
            url = await asyncio.to_thread(data_uri, image)
            self.parts[choice].append({"type": "image_url", "image_url": {"url": url}})
            self.parameters["image"] = dict(event.parameters) | {"seed": self.seed}
            return assistant(Image(image, "target"))
        self.parts[choice].append({"type": "text", "text": text})
        self.reasons[choice] = event.reason
        parameters = dict(event.parameters)
        parameters["max_tokens"] = parameters.pop("max_new_tokens")
        self.parameters |= parameters | {"stop": self.body.stops, "seed": self.seed}
        return assistant(text)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.worker.engine.name}

    def _usage(self) -> dict[str, Any]:
        u = self.usage
        return {
            "prompt_tokens": u.read,
            "completion_tokens": u.written,
            "total_tokens": u.read + u.written,
            "pictures": u.pictures,
        }

    async def answer(self, call: Call) -> dict[str, Any]:
        """The answer at once."""
        async for _ in self._follow(call):
            pass
        choices = []
        for i, parts in enumerate(self.parts):
            only_text = self.body.modalities == ["text"]
            message = {"role": "assistant", "content": parts[0]["text"] if only_text else parts, "refusal": None}
            message |= {"reasoning_content": self.reasoning[i]} if self.body.thinks else {}
            logprobs = {"content": self.logprobs[i], "refusal": None} if self.body.logprobs else None
            choices.append({"index": i, "message": message, "logprobs": logprobs, "finish_reason": self.reasons[i]})
        head = self._head("chat.completion")
        return head | {"choices": choices, "usage": self._usage(), "parameters": self.parameters}

    async def events(self, call: Call) -> AsyncIterator[str]:
        """The answer as it comes, as server-sent events."""

        def chunk(i: int, delta: dict, logprobs: Any = None, reason: str | None = None, **more: Any) -> str:
            choice = {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return server_sent(self._head("chat.completion.chunk") | {"choices": [choice]} | more)

        for i in range(self.body.n):
            yield chunk(i, {"role": "assistant", "content": ""})
        async for i, event in self._follow(call):
            if isinstance(event, TextDelta):
                logprobs = {"content": [_logprob(w) for w in event.logprobs]} if self.body.logprobs else None
                yield chunk(i, {"content": event.text}, logprobs)
            elif isinstance(event, ReasoningDelta):
                yield chunk(i, {"reasoning_content": event.text})
            elif isinstance(event, ImagePreview):
                url = await asyncio.to_thread(data_uri, event.image)
                yield chunk(i, {"preview": {"url": url, "step": event.step, "of": event.steps}})
            elif isinstance(event, Stop):
                if event.reason == "image":
                    yield chunk(i, {"content": [self.parts[i][-1]]})
                if len(self.parts[i]) == len(self.body.modalities):
                    yield chunk(i, {}, None, self.reasons[i], parameters=self.parameters)
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield server_sent(self._head("chat.completion.chunk") | {"choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"


def _logprob(word: TokenLogprob) -> dict[str, Any]:
    def one(text: str, value: float) -> dict[str, Any]:
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    return one(word.text, word.logprob) | {"top_logprobs": [one(*likely) for likely in word.top]}
