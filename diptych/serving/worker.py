"""The running batch of one model under asyncio: bounded, timed, cancellable, drained at shutdown.

Calls add requests to the queue. Jobs join and leave the scheduler between two of its ticks, and at no other time. A
tick runs in a thread, so that connections are served meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from math import ceil

from starlette.types import Receive

from diptych.generation.engine import Engine
from diptych.generation.events import Event, ImageDone, ImagePreview, ReasoningDelta, Stop, TextDelta
from diptych.generation.scheduler import ImageJob, ImageRequest, Job, Scheduler, TextJob, TextRequest, Unservable, exact
from diptych.serving.errors import Closing, Failed, Full, Gone, Late, Refused, Wrong
from diptych.serving.metrics import Metrics
from diptych.serving.options import Options


class Worker:
    """The scheduler of one model and the calls that wait for it, within the bounds of ``options``."""

    def __init__(self, engine: Engine, pool: ThreadPoolExecutor, metrics: Metrics, options: Options) -> None:
        self.engine, self.pool, self.metrics, self.options = engine, pool, metrics, options
        self.scheduler = Scheduler(engine.model, slots=options.slots)
        self.calls: dict[int, tuple[Call, int, float]] = {}  # by id(job): its call, its number there, its start
        self.joining: list[Job] = []
        self.leaving: list[Job] = []
        self.wake = asyncio.Event()
        self.closing = False
        self.exact: bool | None = None  # whether batching changes no bit; unknown before ``start``
        self.seconds = 1.0  # that a request takes, smoothed
        self.task: asyncio.Task | None = None

    @property
    def waiting(self) -> int:
        """How many requests are queued."""
        return len(self.scheduler.waiting) + len(self.joining)

    @property
    def ready(self) -> bool:
        """Whether requests are accepted and worked on."""
        return self.task is not None and not self.task.done() and not self.closing

    def call(self) -> Call:
        """A new client's call. Raises ``Closing`` while the server shuts down."""
        if self.closing:
            raise Closing("the server is shutting down", 5)
        return Call(self)

    def prepare(self, request: TextRequest | ImageRequest) -> Job:
        """The request as a job that is not queued yet. Raises ``ValueError`` where it cannot be served."""
        job, most = self.scheduler.prepare(request), self.options.limits.drawn
        if isinstance(job, ImageJob) and job.canvas[0] * job.canvas[1] > most:
            raise ValueError(f"size {job.canvas[1]}x{job.canvas[0]} has more than {most} pixels")
        return job

    async def start(self) -> None:
        """Measures whether batching is exact here, then begins to work."""
        loop = asyncio.get_running_loop()
        self.exact = await loop.run_in_executor(self.pool, exact, self.engine.model)
        self.task = loop.create_task(self._run(), name=f"worker {self.engine.name}")

    async def close(self, grace: float) -> None:
        """Accepts no more calls; those in hand may finish within ``grace`` seconds and are refused afterwards."""
        self.closing = True
        until = time.monotonic() + grace
        while self.calls and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self._fail([*self.calls], Closing(f"the server shut down before this was finished (grace {grace:g} s)", 5))

    async def stop(self) -> None:
        """Ends the loop after the current tick."""
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
                self._pass_on(job, event)
            if error := tick.exception():
                refusal: Refused = Failed("the model failed on this request; the log says why")
                if isinstance(error, Unservable):
                    refusal = Wrong(str(error))
                else:
                    self.metrics.error(error)
                failed = [*scheduler.active]
                for job in failed:
                    scheduler.cancel(job)
                self._fail([id(job) for job in failed], refusal)

    def _pass_on(self, job: Job, event: Event) -> None:
        """Hands an event to the call of its job, unless that was cancelled during the tick, and counts it."""
        if entry := self.calls.get(id(job)):
            call, number, since = entry
            if isinstance(event, Stop):
                del self.calls[id(job)]
                self.seconds += 0.2 * (time.monotonic() - since - self.seconds)
                self.metrics.done(self.engine.name, event, "text" if isinstance(job, TextJob) else "image")
            elif not call.answered and isinstance(event, (TextDelta, ReasoningDelta, ImagePreview, ImageDone)):
                call.answered = True
                self.metrics.first(self.engine.name, event, time.monotonic() - call.since)
            call.events.put_nowait((number, event))

    def _fail(self, jobs: list[int], error: Refused) -> None:
        for call in {id(c): c for j in jobs if j in self.calls for c in [self.calls[j][0]]}.values():
            call.end(error)


class Call:
    """The requests of one client, and their events as they come."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.since = worker, time.monotonic()
        self.answered = False  # whether the client has seen a part of the answer
        self.events: asyncio.Queue[tuple[int, Event | Refused]] = asyncio.Queue()
        self.jobs: list[Job] = []
        timeout = worker.options.timeout
        late = Late(f"not finished after {timeout:g} s")
        self.timer = asyncio.get_running_loop().call_later(timeout, self.end, late)
        self.over = False
        self.watcher: asyncio.Task | None = None

    def watch(self, receive: Receive) -> None:
        """Ends the call when the client leaves."""

        async def until_gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.end(Gone("the client has left"))

        self.watcher = asyncio.get_running_loop().create_task(until_gone())

    def submit(self, *requests: TextRequest | ImageRequest) -> None:
        """Queues requests. Raises ``ValueError`` for one that cannot be served and ``Full`` when the queue is full;
        further requests of a call that has begun are queued in any case."""
        worker = self.worker
        jobs = [worker.prepare(r) for r in requests]
        if self.over:
            return
        if not self.jobs and worker.waiting + len(jobs) > worker.options.queue:
            seconds = max(1, ceil(worker.waiting * worker.seconds / worker.scheduler.slots))
            message = f"{worker.waiting} requests are waiting and at most {worker.options.queue} may; try again"
            raise Full(message, seconds)
        for job in jobs:
            worker.calls[id(job)] = (self, len(self.jobs), time.monotonic())
            self.jobs.append(job)
        worker.joining += jobs
        worker.wake.set()

    async def follow(self) -> AsyncIterator[tuple[int, Event]]:
        """The events of the submitted requests, each with the request's number, until all have ended. Raises
        ``Refused`` where the call is ended early."""
        while any(id(job) in self.worker.calls for job in self.jobs) or not self.events.empty() or self.over:
            number, event = await self.events.get()
            if isinstance(event, Refused):
                raise event
            yield number, event

    def end(self, error: Refused | None = None) -> None:
        """Ends the call and frees what it holds, at the latest after the current step. ``error`` is raised in
        ``follow``."""
        self.timer.cancel()
        if self.watcher and self.watcher is not asyncio.current_task():
            self.watcher.cancel()
        if self.over:
            return
        self.over = True
        left = [job for job in self.jobs if self.worker.calls.pop(id(job), None)]
        self.jobs.clear()  # frees their caches now: tasks and frames keep a call alive until garbage is collected
        if left:
            self.worker.metrics.ended(error.code if error else Gone.code)
        self.worker.leaving += left
        self.worker.wake.set()
        if error:
            self.events.put_nowait((0, error))
