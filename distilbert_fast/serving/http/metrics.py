"""What Prometheus reads: requests, the queue, batches, and which calls the engine served."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from distilbert_fast.modeling.accelerator import explain
from distilbert_fast.serving.batching import Observer
from distilbert_fast.serving.http.served import Served

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = tuple(4**power for power in range(9))
PREFIX = "distilbert_fast"


class Metrics(Observer):
    """Counts in a registry of their own.

    Args:
        models: whose calls are counted.
        waiting: how many tokens wait.
    """

    def __init__(self, models: Mapping[str, Served], waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.count = 0  # of requests that were answered

        def counter(name: str, words: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, words, labels, registry=self.registry, namespace=PREFIX)

        def histogram(name: str, words: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(name, words, labels, buckets=buckets, registry=self.registry, namespace=PREFIX)

        self.requests = counter("requests", "Requests that were answered.", ("route", "status"))
        self.seconds = histogram("request_seconds", "From a request's head to its answer.", _SECONDS, ("route",))
        self.queue = histogram("queue_seconds", "What a request waited for its first batch.", _SECONDS)
        self.batch_tokens = histogram("batch_tokens", "Real tokens of a batch.", _SIZES)
        self.batch_windows = histogram("batch_windows", "Texts, or windows of texts, of a batch.", _SIZES)
        self.compute = histogram("compute_seconds", "What a batch took.", _SECONDS)
        self.tokens = counter("tokens", "Real tokens that were computed.")
        self.truncated = counter("truncated_texts", "Texts that were cut, as their client allowed.")
        gauge = Gauge("waiting_tokens", "Tokens in the queue.", registry=self.registry, namespace=PREFIX)
        gauge.set_function(waiting)
        self.registry.register(_Calls(models))

    def began(self, waited: float) -> None:
        self.queue.observe(waited)

    def computed(self, windows: int, tokens: int, seconds: float) -> None:
        self.batch_windows.observe(windows)
        self.batch_tokens.observe(tokens)
        self.compute.observe(seconds)
        self.tokens.inc(tokens)

    def answered(self, route: str, status: int, seconds: float) -> None:
        self.count += 1
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Calls(Collector):
    """What ``explain`` says of each model."""

    def __init__(self, models: Mapping[str, Served]) -> None:
        self.models = models

    def collect(self) -> Iterator[CounterMetricFamily]:
        words = "Calls of a model, by whom computed them: the engine, or transformers' own forward and why."
        calls = CounterMetricFamily(f"{PREFIX}_model_calls", words, labels=("model", "by"))
        for name, served in self.models.items():
            found = explain(served.model)
            calls.add_metric((name, "engine"), found.served)
            for why, count in found.fallbacks.items():
                calls.add_metric((name, f"own forward: {why}"), count)
        yield calls
