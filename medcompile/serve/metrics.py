"""What the server counts and measures, and the text of /metrics. Whoever sees something happen tells it here.

A registry of its own, so that two servers in one process share nothing. Labels are names that the operator chose
(bundles, routes) or words of ours; what a client sent is never one, as it may hold a patient's name, and as every new
value would take memory for good.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from medcompile.serve.gpu import GpuCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"
"""The label of what is not among the names known here."""

_REQUEST_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_QUEUE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 60)
_OUTPUT_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)

REFUSALS = ("queue_full", "rate_limit", "unauthorized", "forbidden", "too_large", "timeout", "connections", "draining")
"""Why a request was turned away before a model saw it."""

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_PRIORITIES = {"emergency", "routine", "background"}


@dataclass(frozen=True)
class EngineState:
    """One worker as it is now, and its sums since it started (they begin at 0 again after a restart).

    Fields that make no sense for its kind of model stay 0. resident_bytes: of the worker's process.
    """

    waiting: int = 0
    running: int = 0
    kv_blocks: int = 0
    kv_blocks_used: int = 0
    resident_bytes: int = 0
    preemptions: int = 0
    steps: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0


_GAUGES = {
    "waiting": ("medcompile_requests_waiting", "Requests that wait for a place in the model's batch."),
    "running": ("medcompile_requests_running", "Requests in the model's batch."),
    "kv_blocks": ("medcompile_kv_blocks", "Blocks of keys and values there are."),
    "kv_blocks_used": ("medcompile_kv_blocks_used", "Blocks of keys and values in use."),
    "resident_bytes": ("medcompile_worker_resident_bytes", "Memory of the model's process."),
}
_SUMS = {
    "preemptions": ("medcompile_preemptions_total", "Requests put back for lack of blocks."),
    "steps": ("medcompile_steps_total", "Steps of the decoder."),
    "computed_tokens": (
        "medcompile_computed_tokens_total",
        "Tokens that went through the decoder, guessed ones aside.",
    ),
    "cached_tokens": ("medcompile_prefix_cached_tokens_total", "Tokens of prompts found in the prefix cache."),
    "guessed_tokens": ("medcompile_guessed_tokens_total", "Tokens guessed ahead and checked."),
    "accepted_tokens": ("medcompile_accepted_tokens_total", "Guessed tokens that were right."),
}


class Metrics:
    """routes: the paths that may be a label, as the routes are written ("/v1/models/{model}"). Thread-safe."""

    def __init__(self, routes: Iterable[str] = ()) -> None:
        self.registry = CollectorRegistry()
        self._routes = {*routes}
        self._models: set[str] = set()
        self._last: dict[str, EngineState] = {}
        self._lock = threading.Lock()
        PlatformCollector(registry=self.registry)
        ProcessCollector(registry=self.registry)
        self.registry.register(GpuCollector())

        self._requests = self._counter("medcompile_requests_total", "Requests answered.", ("method", "route", "status"))
        self._seconds = self._histogram(
            "medcompile_request_seconds", "From the request's first byte to the answer's last.", ("route",), _REQUEST_S
        )
        self._in_progress = self._gauge("medcompile_requests_in_progress", "Requests that are being answered.")
        self._connections = self._gauge("medcompile_connections", "Open connections.")
        self._refused = self._counter(
            "medcompile_refused_total", "Requests turned away before a model saw them.", ("reason",)
        )
        self._queue = self._histogram(
            "medcompile_queue_seconds", "From arrival until the model began.", ("model", "priority"), _QUEUE_S
        )
        self._batch = self._histogram(
            "medcompile_batch_size",
            "Items in one run of an encoder, requests in one step of a decoder.",
            ("model",),
            _BATCH,
        )
        self._items = self._counter("medcompile_items_total", "Texts and images that encoders answered.", ("model",))
        self._prompt = self._counter("medcompile_prompt_tokens_total", "Tokens of prompts and texts.", ("model",))
        self._generated = self._counter("medcompile_generated_tokens_total", "Tokens generated.", ("model",))
        self._first = self._histogram(
            "medcompile_first_token_seconds", "TTFT: from arrival to the first token.", ("model",), _FIRST_TOKEN_S
        )
        self._output = self._histogram(
            "medcompile_output_token_seconds", "TPOT: between tokens, per request.", ("model",), _OUTPUT_TOKEN_S
        )
        self._gauges = {field: self._gauge(*told, ("model",)) for field, told in _GAUGES.items()}
        self._sums = {field: self._counter(*told, ("model",)) for field, told in _SUMS.items()}
        self._up = self._gauge("medcompile_worker_up", "1 while the model's process can answer.", ("model",))
        self._restarts = self._counter("medcompile_worker_restarts_total", "Processes started anew.", ("model",))
        self._cache = self._counter("medcompile_response_cache_total", "Look-ups of answers.", ("result",))
        self._audit = self._counter("medcompile_audit_failures_total", "Audit records that could not be written.")
        self._draining = self._gauge("medcompile_draining", "1 once the server takes no new requests.")
        self._info = self._gauge(
            "medcompile_bundle_info", "Always 1; what is served.", ("model", "digest", "variant", "target")
        )

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)

    # ---- requests

    def began(self) -> None:
        self._in_progress.inc()

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """One that began has ended. status: 499 for a client that left before the end."""
        self._in_progress.dec()
        known = route if route in self._routes else OTHER
        self._requests.labels(method if method in _METHODS else OTHER, known, str(status)).inc()
        self._seconds.labels(known).observe(seconds)

    def refused(self, reason: str) -> None:
        """reason: one of REFUSALS."""
        self._refused.labels(reason if reason in REFUSALS else OTHER).inc()

    def connections(self, count: int) -> None:
        self._connections.set(count)

    def cache(self, hit: bool) -> None:
        self._cache.labels("hit" if hit else "miss").inc()

    def audit_failed(self) -> None:
        self._audit.inc()

    def draining(self) -> None:
        self._draining.set(1)

    # ---- models

    def serves(self, model: str, digest: str, variant: str, target: str) -> None:
        """A bundle that is served: from now on its name may be a label."""
        with self._lock:
            self._models.add(model)
        self._info.labels(model, digest, variant, target).set(1)
        self._up.labels(model).set(0)

    def worker(self, model: str, up: bool) -> None:
        self._up.labels(self._known(model)).set(up)

    def restarted(self, model: str) -> None:
        self._restarts.labels(self._known(model)).inc()

    def queued(self, model: str, priority: str, seconds: float) -> None:
        """A request waited so long for its turn."""
        known = priority if priority in _PRIORITIES else OTHER
        self._queue.labels(self._known(model), known).observe(seconds)

    def batch(self, model: str, size: int) -> None:
        """One run of an encoder over so many items, or one step of a decoder for so many requests."""
        self._batch.labels(self._known(model)).observe(size)

    def items(self, model: str, count: int) -> None:
        self._items.labels(self._known(model)).inc(count)

    def tokens(self, model: str, prompt: int, generated: int = 0) -> None:
        """What one request took and gave."""
        self._prompt.labels(self._known(model)).inc(prompt)
        self._generated.labels(self._known(model)).inc(generated)

    def first_token(self, model: str, seconds: float) -> None:
        self._first.labels(self._known(model)).observe(seconds)

    def output_token(self, model: str, seconds: float) -> None:
        """The mean time between one request's tokens, once it has ended with two at least."""
        self._output.labels(self._known(model)).observe(seconds)

    def engine(self, model: str, state: EngineState) -> None:
        """A worker told how it is. What its sums grew by is added to ours, which outlive it."""
        name = self._known(model)
        with self._lock:
            last = self._last.get(name, EngineState())
            self._last[name] = state
        for field, gauge in self._gauges.items():
            gauge.labels(name).set(getattr(state, field))
        fresh = any(getattr(state, field) < getattr(last, field) for field in self._sums)  # another process since then
        for field, counter in self._sums.items():
            counter.labels(name).inc(getattr(state, field) - (0 if fresh else getattr(last, field)))

    def _known(self, model: str) -> str:
        return model if model in self._models else OTHER

    def _counter(self, name: str, told: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name.removesuffix("_total"), told, labels, registry=self.registry)

    def _gauge(self, name: str, told: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(name, told, labels, registry=self.registry)

    def _histogram(self, name: str, told: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, told, labels, buckets=buckets, registry=self.registry)


def names(metrics: Metrics) -> Mapping[str, str]:
    """Every series of /metrics with its type: histograms by _bucket, _sum and _count, counters by _total."""
    found: dict[str, str] = {}
    for family in metrics.registry.collect():
        ends = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        found |= {family.name + end: family.type for end in ends}
    return found
