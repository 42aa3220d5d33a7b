"""The measurements that Prometheus reads at ``/metrics``, and the server's log."""

from __future__ import annotations

import logging

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from diptych.generation.events import Event, ImagePreview, Stop, TextDelta

log = logging.getLogger("diptych.serving")
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """The measurements of one server, in a registry of its own."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        ProcessCollector(registry=r)
        self.requests = Counter("diptych_requests", "HTTP requests", ("route", "status"), registry=r)
        self.latency = Histogram("diptych_request_seconds", "HTTP requests", ("route",), buckets=SECONDS, registry=r)
        self.queue = Gauge("diptych_waiting", "Requests in the queue", ("model",), registry=r)
        self.running = Gauge("diptych_running", "Requests in the running batch", ("model",), registry=r)
        self.ticks = Histogram("diptych_tick_seconds", "One step of the batch", ("model",), buckets=SECONDS, registry=r)
        self.batch = Histogram(
            "diptych_batch_size", "Requests in a step", ("model",), buckets=(1, 2, 4, 8, 16, 32), registry=r
        )
        self.begun = Histogram(
            "diptych_first_seconds",
            "Until the first text, preview or picture",
            ("model", "kind"),
            buckets=SECONDS,
            registry=r,
        )
        self.tokens = Counter("diptych_tokens", "Tokens", ("model", "kind"), registry=r)
        self.answers = Counter("diptych_answers", "Answers and pictures finished", ("model", "kind"), registry=r)
        self.unfinished = Counter("diptych_unfinished", "Requests ended before they were done", ("why",), registry=r)
        self.errors = Counter("diptych_errors", "Errors of the model", registry=r)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Counts an HTTP request that has been answered."""
        self.requests.labels(route, status).inc()
        self.latency.labels(route).observe(seconds)

    def load(self, model: str, waiting: int, running: int) -> None:
        """Sets how many requests of a model wait and run."""
        self.queue.labels(model).set(waiting)
        self.running.labels(model).set(running)

    def tick(self, model: str, seconds: float, running: int) -> None:
        """Records a step of a running batch."""
        self.ticks.labels(model).observe(seconds)
        self.batch.labels(model).observe(running)

    def first(self, model: str, event: Event, seconds: float) -> None:
        """Records the first text, preview or picture of a request."""
        kind = {TextDelta: "text", ImagePreview: "preview"}.get(type(event), "image")
        self.begun.labels(model, kind).observe(seconds)

    def done(self, model: str, event: Stop, kind: str) -> None:
        """Counts a request that is finished."""
        self.answers.labels(model, kind).inc()
        self.tokens.labels(model, "read").inc(event.usage.read)
        self.tokens.labels(model, "written").inc(event.usage.written)

    def ended(self, why: str) -> None:
        """Counts a request that ended unfinished."""
        self.unfinished.labels(why).inc()

    def error(self, error: BaseException) -> None:
        """Counts and logs a step that failed."""
        self.errors.inc()
        log.error("a step failed", exc_info=error)
