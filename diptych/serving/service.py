"""The models of a server, and what its endpoints share."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import PIL.Image
from fastapi import Request
from pydantic import TypeAdapter, ValidationError

from diptych.core.sample import Image, Sample, assistant, check_text, user
from diptych.generation.engine import Engine
from diptych.generation.thinking import Think
from diptych.models.protocol import Settings
from diptych.serving.errors import NotFound, Refused, plain_message
from diptych.serving.fetch import fetch
from diptych.serving.metrics import Metrics, log
from diptych.serving.options import Options
from diptych.serving.pictures import decode
from diptych.serving.run_folders import Runs
from diptych.serving.schemas import ToDraw
from diptych.serving.store import FileStore
from diptych.serving.worker import Call, Worker

SEEDS = 2**31  # of requests without a seed


class Service:
    """The workers of a server's models, its stored files and its metrics."""

    def __init__(self, engines: Sequence[Engine], options: Options) -> None:
        if len({e.name for e in engines}) != len(engines):
            raise ValueError(f"models must have different names, not {', '.join(e.name for e in engines)}")
        self.options, self.limits, self.metrics = options, options.limits, Metrics()
        self.pool = ThreadPoolExecutor(1, "model")  # models take turns: each of their steps uses all cores
        self.workers = {e.name: Worker(e, self.pool, self.metrics, options) for e in engines}
        self.store, self.runs, self.created = FileStore(options.limits), Runs(options.runs), int(time.time())

    async def start(self) -> None:
        """Starts the workers."""
        for worker in self.workers.values():
            await worker.start()
            if not worker.exact:
                log.warning("%s: on this machine batching changes pictures by rounding errors", worker.engine.name)

    async def drain(self) -> None:
        """Lets requests in hand finish within the grace period and refuses the rest."""
        await asyncio.gather(*(worker.close(self.options.grace) for worker in self.workers.values()))

    async def stop(self) -> None:
        """Ends the workers."""
        await asyncio.gather(*(worker.stop() for worker in self.workers.values()))
        self.pool.shutdown()

    def worker(self, name: str | None) -> Worker:
        """The worker of a model; the first one where no model is named. Raises ``NotFound``."""
        if name is None:
            return next(iter(self.workers.values()))
        if name not in self.workers:
            raise NotFound(f"no model {name[:100]!r}; here are: {', '.join(self.workers)}")
        return self.workers[name]

    def begin(
        self, request: Request, worker: Worker, submit: Callable[[Call], None], body: ToDraw, prompt: str
    ) -> Call:
        """A call whose requests ``submit`` queues, and that ends when its client leaves."""
        client = "" if body.user is None else f" user {body.user!r}"
        request.state.note = worker.engine.name + client + (f" {prompt!r}" if self.options.log_prompts else "")
        call = worker.call()
        try:
            submit(call)
        except (ValueError, Refused):
            call.end()
            raise
        call.watch(request.receive)
        return call

    # ---- what requests mean -------------------------------------------------------------------------------------

    def text(self, text: str, name: str) -> str:
        """The text. Raises ``ValueError`` for one that is too long or cannot be encoded."""
        if len(text) > self.limits.prompt:
            raise ValueError(f"{name} has {len(text)} characters; at most {self.limits.prompt}")
        return check_text(text, name)

    def settings(self, engine: Engine, body: ToDraw, sample: Sample) -> Settings:
        """The model's settings for the request ``sample`` with the changes of ``body``. Raises ``ValueError`` for
        unknown names, wrong types, numbers that are not finite, and too many steps."""
        named = {
            "num_inference_steps": body.one_of("num_inference_steps", "steps"),
            "guidance_scale": body.one_of("guidance_scale", "true_cfg_scale", "cfg_scale"),
            "image_guidance_scale": getattr(body, "image_guidance_scale", None),
        }
        given = {k: v for k, v in named.items() if v is not None}
        if twice := sorted(given.keys() & body.settings.keys()):
            raise ValueError(f"{', '.join(twice)} is given twice, also in settings")
        changes = given | body.settings
        engine.settings({k: None for k in changes})  # raises for unknown names
        try:
            defaults = engine.model.defaults(sample, body.preset or "")
            chosen = TypeAdapter(type(defaults)).validate_json(json.dumps(asdict(defaults) | changes), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"settings{where and '.'}{where}: {plain_message(first)}") from error
        for name, value in asdict(chosen).items():
            for number in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(number, float) and not abs(number) <= 1e6:
                    raise ValueError(f"settings.{name} must be a finite number up to 1e6, not {number}")
        model = engine.model
        asked = replace(sample, messages=(*sample.messages, assistant(Image(None, "target", body.canvas))))
        steps = model.steps(model.canvas(asked), chosen)
        if steps > max(self.limits.steps, model.steps(model.canvas(open_drawing()), model.settings)):
            raise ValueError(f"num_inference_steps may be at most {self.limits.steps}, not {steps}")
        return chosen

    def thinking(self, engine: Engine, body: ToDraw, think: bool) -> Think | None:
        """How a plan is written, within the limits of an answer; None without ``think``."""
        budget = engine.thinking(think, body.preset or "")
        return budget and replace(budget, max_new_tokens=min(budget.max_new_tokens, self.limits.new_tokens))

    def warnings(self, worker: Worker, body: ToDraw, sample: Sample) -> dict[str, str]:
        """The ``warning`` header of an answer: parameters without effect, and pictures of shapes that the model was not
        trained on. Empty where there is nothing to say. A strict server raises ``ValueError`` for the former."""
        names = [*body.ignored()]
        if names and self.options.strict:
            raise ValueError(f"{names[0]}: this server is strict and refuses parameters without effect")
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        texts = [f"ignored: {', '.join(names[:20])}{more}"] if names else []
        texts += worker.engine.sizes.remarks(sample)
        return {"warning": ", ".join(f'299 diptych "{text}"' for text in texts)} if texts else {}

    async def picture(self, url: str, name: str) -> PIL.Image.Image:
        """The picture of a message: a data URI, an upload, or a URL of an allowed host. Raises ``ValueError``."""
        scheme = url.partition(":")[0].lower() if ":" in url else ""
        if scheme == "data":
            return await decode(url, name, self.limits)
        if scheme in ("http", "https"):
            hosts = self.options.hosts
            if not hosts:
                raise ValueError(f"{name}: pictures by URL are not fetched here; send a data URI or an upload")
            return await decode(url, name, self.limits, lambda address: fetch(address, hosts))
        file = self.store.get(url)
        if file is None:
            raise ValueError(f"{name}: {url[:60]!r} is neither a data URI nor an upload that is still here")
        return await decode(file.data, name, self.limits)


def open_drawing(*pictures: Image) -> Sample:
    """A request for a picture of the model's own size, made from ``pictures``."""
    return Sample("request", (user(*pictures, "a"), assistant(Image(None, "target"))))


def seed_of(body: ToDraw) -> int:
    """The request's seed; a random one where it has none."""
    return secrets.randbelow(SEEDS) if body.seed is None else body.seed
