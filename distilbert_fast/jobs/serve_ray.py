"""What `distilbert-fast serve --ray` runs: the application of `serve` in replicas on a Ray cluster.

Each replica has its own models, queue and batches of real tokens; Ray sends a request to the less busy of two replicas,
and starts more of them while each has many requests.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distilbert_fast.jobs.ray_cluster import connected, last_line
from distilbert_fast.jobs.settings import RecipeError, require
from distilbert_fast.serving.http.service import Limits

JOB = "serve"
NAME = "distilbert-fast"  # of the application
BUSY = 16  # requests that each replica has at once, in the mean, before Ray starts another
_MOST = 10_000  # requests of a replica at once: its own queue refuses what it cannot answer in time
_PATIENCE = 60.0  # seconds until the address answers
log = logging.getLogger("distilbert_fast.serve")


def serve_on_ray(
    models: Sequence[str],
    tasks: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    precision: str | None = None,
    max_length: int | None = None,
    key_file: Path | None = None,
    packed: Path | None = None,
    threads: int | None = None,
    limits: Limits | None = None,
    access_log: bool = True,
    replicas: int | None = None,
    ready: Callable[[str, threading.Event], None] = lambda address, stop: None,
) -> None:
    """Serve models on the cluster until SIGTERM or Ctrl-C; then answer what was taken.

    Args:
        models: directories that every machine has, or hub ids; see ``serve``.
        host, port: where Ray's proxies listen, one on each machine with a replica; port 0 takes a free one.
        threads: of each replica; None: 1.
        replicas: the most there may be, one at first; None: as many as the cluster has cores for.
        ready: called with the address once requests are served, and with an event that ends this.

    The others are those of ``serve``. Raises RecipeError for what a user can mend.
    """
    from distilbert_fast.jobs import serve as here  # which needs the extra `serve`

    limits = limits or Limits()
    here.check_limits(limits)
    specs, key = here.model_specs(models, tasks), here.read_key(key_file)
    threads = 1 if threads is None else threads
    require(threads >= 1, f"{JOB}: threads", "1 or more", threads)
    with here.listening(host, port) as free:  # which Ray takes afterwards
        port, address = free.getsockname()[1], here.address_of(free)
        is_open = key is None and not here.is_loopback(free)
    ray = connected(f"{JOB}: ray", "ray.serve")
    from ray import serve

    cores = int(ray.cluster_resources().get("CPU", 0))
    most = max(1, cores // threads)
    has = f"1 to {most}, for {threads} threads each of the cluster's {cores} cores"
    require(replicas is None or 1 <= replicas <= most, f"{JOB}: replicas", has, replicas)

    def build() -> Any:
        import torch

        from distilbert_fast.jobs import serve as there
        from distilbert_fast.serving.http.app import application

        torch.set_num_threads(threads)
        there.log_to_stderr(access_log)
        return application(there.load(specs, limits, key, precision, max_length, packed))

    patience = limits.deadline + 5
    deployment = serve.deployment(
        serve.ingress(build)(),
        name=NAME,
        ray_actor_options={"num_cpus": threads},
        autoscaling_config={"min_replicas": 1, "max_replicas": replicas or most, "target_ongoing_requests": BUSY},
        max_ongoing_requests=_MOST,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=patience,
    )
    here.log_to_stderr(access_log)
    if is_open:
        log.warning("%s can be reached from other machines, and asks for no token: see --api-key-file", address)
    require(NAME not in serve.status().applications, f"{JOB}: ray", f"no application {NAME!r} there yet", "one")
    stop = threading.Event()
    before = here.set_handlers(stop.set)
    others = serve.status().applications  # of a Ray Serve that runs already
    try:
        serve.start(http_options={"host": host, "port": port, "request_timeout_s": patience})
        try:
            serve.run(deployment.bind(), name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise RecipeError(f"{JOB}: ray: no replica could be started: {last_line(error)}") from error
        _wait_for(address)
        log.info("ready at %s on Ray, 1 to %d replicas", address, replicas or most)
        ready(address, stop)
        while not stop.wait(1.0):  # with a time, so that signals are seen
            pass
        log.info("stopping: what was taken is answered first")
    finally:
        serve.delete(NAME)
        if not others:
            serve.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)
    log.info("stopped")


def _wait_for(address: str) -> None:
    """Raise RecipeError if nothing of ours answers there: a Ray Serve that runs already keeps its own address."""
    end = time.monotonic() + _PATIENCE
    why = "no answer"
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
                if reply.read() == b'{"status":"ok"}':
                    return
                why = "another server answers"
        except (OSError, urllib.error.URLError) as error:
            why = last_line(error)
        time.sleep(0.2)
    raise RecipeError(f"{JOB}: ray: {address} does not answer ({why}); does Ray Serve run with another address?")
