"""The running batch of one model under asyncio: bounded, timed, cancellable, drained before it ends.

Calls put requests in line; between two ticks of the scheduler, and only then, who has come joins and who has gone
leaves. A tick runs in a thread, so that connections are served meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from math import ceil

from starlette.types import Receive

from diptych.generation.engine import Engine
from diptych.generation.events import Event, ImageDone, ImagePreview, Stop, TextDelta
from diptych.generation.scheduler import Draw, Job, Say, Scheduler, Sketch, Talk, Unfit, exact
from diptych.serving.metrics import Metrics


class Refused(Exception):
    """A request that gets no answer, and why: the HTTP status, a word for it, and when to come back."""

    status, code = 500, "internal_error"

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Wrong(Refused):
    """What the model cannot do with this request."""

    status, code = 400, "invalid_value"


class Full(Refused):
    status, code = 429, "queue_full"


class Late(Refused):
    status, code = 504, "timeout"


class Closing(Refused):
    status, code = 503, "shutting_down"


class Failed(Refused):
    """An error of ours, told without its details, which are in the log."""


class Gone(Refused):
    """The client has left; nobody will read this."""

    status, code = 499, "client_closed_request"


class Worker:
    """One model's scheduler and who waits for it. ``slots`` requests run together, ``queue`` wait, and a call that
    takes longer than ``timeout`` seconds is given up. No picture is larger than ``drawn`` pixels."""

    def __init__(
        self,
        engine: Engine,
        pool: ThreadPoolExecutor,
        metrics: Metrics,
        slots: int,
        queue: int,
        timeout: float,
        drawn: int,
    ) -> None:
        self.engine, self.pool, self.metrics = engine, pool, metrics
        self.queue, self.timeout, self.drawn = queue, timeout, drawn
        self.scheduler = Scheduler(engine.model, slots=slots)
        self.calls: dict[int, tuple[Call, int, float]] = {}  # by id(job): whose it is, its number there, since when
        self.joining: list[Job] = []
        self.leaving: list[Job] = []
        self.wake = asyncio.Event()
        self.closing = False
        self.exact: bool | None = None
        self.seconds = 1.0  # what a request takes, smoothed
        self.task: asyncio.Task | None = None

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self.scheduler.waiting) + len(self.joining)

    @property
    def ready(self) -> bool:
        """Whether requests are being worked on and taken."""
        return self.task is not None and not self.task.done() and not self.closing

    def call(self) -> Call:
        """A new client's call. Raises ``Closing`` when the server is about to end."""
        if self.closing:
            raise Closing("the server is shutting down", 5)
        return Call(self)

    def prepare(self, request: Say | Draw) -> Job:
        """The request checked. Raises ``ValueError``."""
        job = self.scheduler.prepare(request)
        if isinstance(job, Sketch) and job.canvas[0] * job.canvas[1] > self.drawn:
            raise ValueError(f"size {job.canvas[1]}x{job.canvas[0]} has more than {self.drawn} pixels")
        return job

    async def start(self) -> None:
        """Tries the model out, then begins to work."""
        loop = asyncio.get_running_loop()
        self.exact = await loop.run_in_executor(self.pool, exact, self.engine.model)
        self.task = loop.create_task(self._run(), name=f"worker {self.engine.name}")

    async def close(self, grace: float) -> None:
        """Takes no more calls, lets those in hand finish for ``grace`` seconds, then tells the rest."""
        self.closing = True
        until = time.monotonic() + grace
        while self.calls and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self._fail([*self.calls], Closing(f"the server shut down before this was finished (grace {grace:g} s)", 5))

    async def stop(self) -> None:
        """Ends the loop after the tick in hand."""
        self.closing = True
        self.wake.set()
        if self.task:
            await self.task

    async def _run(self) -> None:
        loop, scheduler = asyncio.get_running_loop(), self.scheduler
        while True:
            scheduler.waiting.extend(self.joining)
            for job in self.leaving:
                scheduler.cancel(job)
            self.joining, self.leaving = [], []
            self.metrics.load(self.engine.name, self.waiting, len(scheduler.running))
            if scheduler.idle:
                if self.closing and not self.calls:
                    return
                self.wake.clear()
                await self.wake.wait()
                continue
            start = time.perf_counter()
            tick = loop.run_in_executor(self.pool, scheduler.tick)
            await asyncio.wait([tick])
            self.metrics.tick(self.engine.name, time.perf_counter() - start, len(scheduler.running))
            for job, event in scheduler.events:
                self._tell(job, event)
            if error := tick.exception():
                told: Refused = Failed("the model failed on this request; the log says why")
                if isinstance(error, Unfit):
                    told = Wrong(str(error))
                else:
                    self.metrics.error(error)
                at = [*scheduler.at]
                for job in at:
                    scheduler.cancel(job)
                self._fail([id(job) for job in at], told)

    def _tell(self, job: Job, event: Event) -> None:
        if found := self.calls.get(id(job)):  # else cancelled during the tick
            call, number, since = found
            if isinstance(event, Stop):
                del self.calls[id(job)]
                self.seconds += 0.2 * (time.monotonic() - since - self.seconds)
                self.metrics.done(self.engine.name, event, "text" if isinstance(job, Talk) else "image")
            elif not call.told and isinstance(event, (TextDelta, ImagePreview, ImageDone)):
                call.told = True
                self.metrics.first(self.engine.name, event, time.monotonic() - call.since)
            call.events.put_nowait((number, event))

    def _fail(self, jobs: list[int], error: Refused) -> None:
        for call in {id(c): c for j in jobs if j in self.calls for c in [self.calls[j][0]]}.values():
            call.end(error)


class Call:
    """What one client waits for: one or several requests, and their events as they come."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.since, self.told = worker, time.monotonic(), False
        self.events: asyncio.Queue[tuple[int, Event | Refused]] = asyncio.Queue()
        self.jobs: list[Job] = []
        late = Late(f"not finished after {worker.timeout:g} s")
        self.timer = asyncio.get_running_loop().call_later(worker.timeout, self.end, late)
        self.over = False
        self.watcher: asyncio.Task | None = None

    def watch(self, receive: Receive) -> None:
        """Ends the call when the client leaves."""

        async def until_gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.end(Gone("the client has left"))

        self.watcher = asyncio.get_running_loop().create_task(until_gone())

    def submit(self, *requests: Say | Draw) -> None:
        """Puts requests in line. Raises ``ValueError`` for one that cannot be served and ``Full`` when the line is;
        a call that has begun goes on without asking for room."""
        w = self.worker
        jobs = [w.prepare(r) for r in requests]
        if self.over:
            return
        if not self.jobs and w.waiting + len(jobs) > w.queue:
            seconds = max(1, ceil(w.waiting * w.seconds / w.scheduler.slots))
            raise Full(f"{w.waiting} requests are waiting and at most {w.queue} may; try again", seconds)
        for job in jobs:
            w.calls[id(job)] = (self, len(self.jobs), time.monotonic())
            self.jobs.append(job)
        w.joining += jobs
        w.wake.set()

    async def follow(self) -> AsyncIterator[tuple[int, Event]]:
        """Events of what has been submitted, with the number of the request, until all have ended. Raises
        ``Refused``."""
        while any(id(job) in self.worker.calls for job in self.jobs) or not self.events.empty() or self.over:
            number, event = await self.events.get()
            if isinstance(event, Refused):
                raise event
            yield number, event

    def end(self, error: Refused | None = None) -> None:
        """Frees what the call holds, at the latest after the step that is being computed."""
        self.timer.cancel()
        if self.watcher and self.watcher is not asyncio.current_task():
            self.watcher.cancel()
        if self.over:
            return
        self.over = True
        left = [job for job in self.jobs if self.worker.calls.pop(id(job), None)]
        self.jobs.clear()  # with their contexts, now: tasks and frames hold a call until garbage is collected
        if left:
            self.worker.metrics.ended(error.code if error else Gone.code)
        self.worker.leaving += left
        self.worker.wake.set()
        if error:
            self.events.put_nowait((0, error))
