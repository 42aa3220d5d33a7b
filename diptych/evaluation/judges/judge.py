"""Judges: any vision-language model behind an OpenAI-compatible address, and a cache on the disk that replays.

A reply is kept under a hash of the judge's name, the question and the pictures (their pixels), so that nothing is asked
twice, and an evaluation replays without the judge: ``Judge("name", cache=FOLDER)`` without an address only reads.
The cached file holds question, reply and date, because a served judge changes over time.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import PIL.Image

from diptych.data.canvas import rgb
from diptych.evaluation import files
from diptych.evaluation.addresses import NO_KEY, query, without_secrets
from diptych.evaluation.judges import replies
from diptych.machine import disk
from diptych.machine.extras import install
from diptych.parts.images import data_uri

T = TypeVar("T")
ATTEMPTS = 3  # at a reply that can be read


class Unreachable(ValueError):
    """The server failed, not the request: it is down, busy, refuses our key, or does not have the model."""


@dataclass(frozen=True)
class Reply:
    """A judge's reply; ``first`` are the likeliest first tokens with their log-probabilities, if asked for."""

    text: str
    first: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Judge:
    """A judge. ``url`` is the address of an OpenAI-compatible server ("http://host:8000/v1"), None for the cache alone;
    ``model`` its name there and in score names."""

    model: str
    url: str | None = field(default=None, repr=False)  # may hold a password
    cache: Path | None = None
    key: str = field(default=NO_KEY, repr=False)
    workers: int = 8
    timeout: float = 120.0
    retries: int = 4

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("a judge needs the name of its model, which is part of every score's name")
        if self.url is None and self.cache is None:
            raise ValueError(f"the judge {self.model!r} has neither an address nor a cache to replay")

    @property
    def stamp(self) -> dict[str, Any]:
        """The judge's settings as a result records them."""
        return {"judge": self.model, "temperature": 0}

    def ask(
        self,
        text: str,
        images: Sequence[PIL.Image.Image] = (),
        system: str = "",
        logprobs: int = 0,
        max_tokens: int = 1024,
        attempt: int = 0,
    ) -> Reply:
        """The reply to a question about pictures, at temperature 0; from the cache where it is there. ``logprobs`` asks
        for so many of the likeliest first tokens; another ``attempt`` is another question to the cache.

        Raises ``ValueError`` for a server that refuses or cannot be reached, and for a reply that is not in the cache
        of a judge without an address."""
        asked = {"model": self.model, "system": system, "text": text, "logprobs": logprobs, "attempt": attempt}
        asked |= {"images": [hashlib.sha256(str(i.size).encode() + rgb(i).tobytes()).hexdigest() for i in images]}
        name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        file = self.cache / name[:2] / f"{name}.json" if self.cache else None
        if file is not None and file.is_file():
            row = files.load(file)
            return Reply(row["reply"], tuple((t, p) for t, p in row["first"]))
        if self.url is None:
            raise ValueError(
                f"{self.cache} has no reply of {self.model} to {text[:80]!r}, and there is no judge to ask"
            )
        reply = self._ask(text, images, system, logprobs, max_tokens)
        if file is not None:
            row = asked | {
                "reply": reply.text,
                "first": reply.first,
                "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            disk.write_text(file, json.dumps(row, indent=1))
        return reply

    def _ask(self, text: str, images: Sequence[PIL.Image.Image], system: str, logprobs: int, max_tokens: int) -> Reply:
        """The judge's reply from its server. Raises ``ValueError`` without log-probabilities that are asked for."""
        content: list[dict] = [{"type": "image_url", "image_url": {"url": data_uri(i)}} for i in images]
        messages: list[dict] = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": text}]})
        more: dict[str, Any] = {"logprobs": True, "top_logprobs": logprobs} if logprobs else {}
        assert self.url is not None
        response = call(
            self.url,
            self.key,
            self.timeout,
            lambda client: client.chat.completions.create(
                model=self.model, messages=messages, temperature=0, max_tokens=max_tokens, **more
            ),
            self.retries,
        )
        choice = response.choices[0]
        first: tuple[tuple[str, float], ...] = ()
        if logprobs:
            if not (choice.logprobs and choice.logprobs.content):
                raise ValueError(f"the judge {self.model} gives no log-probabilities; a soft score needs them")
            first = tuple((t.token, float(t.logprob)) for t in choice.logprobs.content[0].top_logprobs)
        return Reply(replies.spoken(choice.message.content or ""), first)

    def read(
        self, parse: Callable[[str], T | None], text: str, images: Sequence[PIL.Image.Image], system: str = ""
    ) -> T | None:
        """What ``parse`` reads in the reply; a reply that it cannot read is asked for again, at most three times, and
        then there is None: nothing is guessed."""
        for attempt in range(ATTEMPTS):
            if (parsed := parse(self.ask(text, images, system, attempt=attempt).text)) is not None:
                return parsed
        return None

    def of(self, work: Callable[[Any, Any], Any]) -> Callable[[Sequence, Sequence], list]:
        """A benchmark's judge from ``work(item, made) -> Verdict``, several at once."""
        return lambda items, outputs: self.every(lambda pair: work(*pair), list(zip(items, outputs, strict=True)))

    def every(self, work: Callable[[Any], T], things: Sequence[Any]) -> list[T]:
        """``work`` of each thing, several at once, in order."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(work, things))


def call(url: str, key: str, timeout: float, work: Callable[[Any], T], retries: int = 4) -> T:
    """What ``work`` gets from a client of that address, which tries again what may pass. Raises ``ValueError`` naming
    the address and the reason, and ``Unreachable`` where any other request would have failed, too."""
    try:
        return work(_client(url, key, timeout, retries))
    except client_package().OpenAIError as error:
        this = getattr(error, "status_code", None) in (400, 413, 415, 422, 500)  # 500: what breaks on one item alone
        raise (ValueError if this else Unreachable)(without_secrets(f"{url}: {error}", url, key)) from None


@cache
def _client(url: str, key: str, timeout: float, retries: int) -> Any:
    address = url.partition("#")[0].partition("?")[0]
    return client_package().OpenAI(
        base_url=address, default_query=query(url), api_key=key, timeout=timeout, max_retries=retries
    )


def client_package() -> Any:
    """The package ``openai``. Raises ``ValueError`` saying how to get it."""
    try:
        import openai
    except ImportError as error:
        raise ValueError(f"endpoints and judges need the package openai: {install('evaluate')}") from error
    return openai
