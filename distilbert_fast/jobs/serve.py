"""What `distilbert-fast serve` runs: models loaded and warmed up, then a server until it is told to stop.

It has its port before the models are loaded, so that one in use is said at once, and accepts after they are warm.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import re
import signal
import socket
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import uvicorn

from distilbert_fast.jobs.settings import RecipeError, refused, require
from distilbert_fast.modeling.accelerator import explain
from distilbert_fast.serving.http.app import application
from distilbert_fast.serving.http.connection import Connection
from distilbert_fast.serving.http.served import Served
from distilbert_fast.serving.http.service import Limits, Service
from distilbert_fast.serving.tasks import SERVED_TASKS

JOB = "serve"
KEY = "DISTILBERT_FAST_API_KEY"  # the environment variable with the token
_NAME = re.compile(r"[\w.-]+")
log = logging.getLogger("distilbert_fast.serve")


class ModelSpec(NamedTuple):
    """A model, what clients call it, and its task; None: what it has the head for."""

    name: str
    source: str
    task: str | None


def serve(
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
    ready: Callable[[str, uvicorn.Server], None] = lambda address, server: None,
) -> int:
    """Serve models over HTTP until SIGTERM or Ctrl-C; then answer what was taken.

    Args:
        models: DIR_OR_ID or NAME=DIR_OR_ID each; the name is else the last part of the directory or id.
        tasks: TASK for the only model, or NAME=TASK each; by default what a model has the head for.
        host, port: to listen at; port 0 takes a free one.
        precision, max_length: see ``Predictor``.
        key_file: its first line is the token that clients must show; None: that of the environment variable
            DISTILBERT_FAST_API_KEY, or none.
        packed: directory for packed weights, which processes of one machine then share; None: each has its own.
        threads: of torch; None: its own number.
        limits: of requests; None: ``Limits()``.
        access_log: log a line for each request, without its texts.
        ready: called with the address once requests are served.

    Returns:
        How many requests were answered.

    Raises:
        RecipeError: what a user can mend, by name.
        CheckpointError, OSError: a model that cannot be used.
    """
    # Texts of a request are tokenized by the thread that has them: one of a pool would wait for a core that computes.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    limits = limits or Limits()
    check_limits(limits)
    specs = model_specs(models, tasks)
    key = read_key(key_file)
    log_to_stderr(access_log)
    if threads is not None:
        require(threads >= 1, f"{JOB}: threads", "1 or more", threads)
        torch.set_num_threads(threads)
    with listening(host, port) as listener:
        service = load(specs, limits, key, precision, max_length, packed)
        address = address_of(listener)
        if key is None and not is_loopback(listener):
            log.warning("%s can be reached from other machines, and asks for no token: see --api-key-file", address)
        return _run(service, listener, address, ready)


def load(
    specs: Sequence[ModelSpec],
    limits: Limits,
    key: str | None = None,
    precision: str | None = None,
    max_length: int | None = None,
    packed: Path | None = None,
) -> Service:
    """Load models, warm them up, and say in the log how each is computed.

    Raises:
        RecipeError: a model that cannot be used.
        OSError: packed weights cannot be written.
    """
    served = []
    for spec in specs:
        file = None if packed is None else packed / f"{spec.name}-{precision or 'as-is'}.safetensors"
        with refused(f"{JOB}: model {spec.name!r}"):
            served.append(Served(spec.name, spec.source, spec.task, precision, max_length, file))
    service = Service(served, limits, key)
    service.warm_up()
    for one in served:
        found = explain(one.model)
        log.info("%s (%s): can %s; %s", one.name, one.source, ", ".join(sorted(one.kinds)), found.engine)
        for why in found.fallbacks:
            log.warning("%s is computed by transformers' own forward: %s", one.name, why)
    return service


def model_specs(models: Sequence[str], tasks: Sequence[str]) -> list[ModelSpec]:
    """Models by their names. Raises RecipeError for a name that is there twice, and for a task of no model."""
    require(len(models) > 0, f"{JOB}: model", "one or more", "none")
    sources: dict[str, str] = {}
    for given in models:
        name, equals, source = given.partition("=")
        if not equals or Path(given).exists():
            name, source = (
                Path(os.path.abspath(given)).name if Path(given).exists() else given.rpartition("/")[2],
                given,
            )
        require(
            bool(source) and bool(_NAME.fullmatch(name)), f"{JOB}: model", "NAME=DIR_OR_ID or DIR_OR_ID", repr(given)
        )
        require(name not in sources, f"{JOB}: model", "names that differ (NAME=DIR_OR_ID)", f"{name!r} twice")
        sources[name] = source
    named: dict[str, str] = {}
    for given in tasks:
        name, equals, task = given.rpartition("=")
        if not equals:
            only = f"NAME={task}, where there are several models"
            require(len(sources) == 1, f"{JOB}: task", only, repr(given))
            name = next(iter(sources))
        require(name in sources, f"{JOB}: task", f"the name of a model ({', '.join(sources)})", repr(given))
        require(task in SERVED_TASKS, f"{JOB}: task", f"one of {', '.join(SERVED_TASKS)}", repr(task))
        named[name] = task
    return [ModelSpec(name, source, named.get(name)) for name, source in sources.items()]


def check_limits(limits: Limits) -> None:
    """Raise RecipeError for a limit out of range."""
    for name, least in (("body_bytes", 1000), ("inputs", 1), ("batch_tokens", 8), ("queue_tokens", 1)):
        given = getattr(limits, name)
        require(given >= least, f"{JOB}: {name}", f"{least} or more", given)
    require(0 < limits.deadline <= 86400, f"{JOB}: deadline", "seconds above 0, 86400 at most", limits.deadline)


def read_key(path: Path | None) -> str | None:
    """The token that clients must show. Raises RecipeError for one that no header can hold."""
    if path is None:
        key, source = os.environ.get(KEY), KEY
        if key is None:
            return None
    else:
        source = repr(str(path))
        try:
            key = (path.read_text().splitlines() or [""])[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise RecipeError(f"{JOB}: api-key-file: cannot read {source}: {reason}") from error
        if stat.S_IMODE(path.stat().st_mode) & 0o044:
            log.warning("%s, the file with the token, can be read by other users", source)
    fits = bool(key) and key.isascii() and key.isprintable() and " " not in key
    if not fits:
        raise RecipeError(f"{JOB}: api-key-file: expected a token of ASCII letters, digits and signs in {source}")
    return key


# Listening ----------------------------------------------------------------------------------------------------------


def listening(host: str, port: int) -> socket.socket:
    """A socket that has its port, and does not accept yet. Raises RecipeError."""
    require(0 <= port < 65536, f"{JOB}: port", "0 to 65535", port)
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except OSError as error:
        raise RecipeError(f"{JOB}: host: {host!r} is no address of this machine: {error.strerror}") from error
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise RecipeError(f"{JOB}: port: {port} is in use at {host}; choose another one with --port") from error
        raise RecipeError(f"{JOB}: host: cannot listen at {host}, port {port}: {error.strerror}") from error
    return listener


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    host = listener.getsockname()[0]
    return host.startswith("127.") or host == "::1"


class _Server(uvicorn.Server):
    """One that says when it listens, and when it is told to stop."""

    def __init__(self, config: uvicorn.Config, listens: Callable[[], None], stops: Callable[[], None]) -> None:
        super().__init__(config)
        self.listens, self.stops = listens, stops

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.listens()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.stops()
        await super().shutdown(sockets)


def _run(service: Service, listener: socket.socket, address: str, ready: Callable[[str, uvicorn.Server], None]) -> int:
    patience = int(service.limits.deadline) + 5  # seconds; by then every request was answered or passed its deadline
    config = uvicorn.Config(
        application(service),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        http=Connection,
        ws="none",
        timeout_graceful_shutdown=patience,
    )

    def listens() -> None:
        log.info("ready at %s; its routes are at %s/docs", address, address)
        ready(address, server)

    def stops() -> None:
        service.draining = True
        log.info("stopping: what was taken is answered first")

    server = _Server(config, listens, stops)
    before = set_handlers()
    gc.collect()
    gc.freeze()  # to look through all that torch holds takes a quarter of a second, in which nobody is answered
    try:
        server.run(sockets=[listener])
    finally:
        gc.unfreeze()
        service.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    log.info("stopped; %d requests were answered", service.metrics.count)
    return service.metrics.count


def set_handlers(stop: Callable[[], None] = lambda: None) -> dict[signal.Signals, Any]:
    """Handlers of SIGTERM and Ctrl-C that call ``stop``, and do not end the process; return what was there before.

    uvicorn has handlers of its own while it runs, and raises the signal that stopped it again once it has stopped.
    """
    try:
        return {number: signal.signal(number, lambda *_: stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread, where uvicorn sets no handlers either
        return {}


def log_to_stderr(access_log: bool) -> None:
    for name in ("distilbert_fast.serve", "distilbert_fast.access", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers.clear()
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logging.getLogger("distilbert_fast.access").setLevel(logging.INFO if access_log else logging.WARNING)
    # What it says else is said here, or is what any client can make it say.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
