"""The Ray cluster that RAY_ADDRESS names or that runs on this machine, else one that is started here."""

from __future__ import annotations

import os
from typing import Any

from distilbert_fast.jobs.settings import RecipeError


def connected(job: str, part: str = "ray") -> Any:
    """The module ``ray``, connected.

    Args:
        job: who asks; its name begins the message.
        part: of Ray that is needed.

    Raises:
        RecipeError: Ray is not installed, or the cluster is not there.
    """
    try:
        import ray

        if part != "ray":
            __import__(part)
    except ModuleNotFoundError as error:
        lacking = f"{error.name} is not installed; pip install 'distilbert-fast[ray]'"
        raise RecipeError(f"{job}: {lacking}") from error
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError) as error:
            address = os.environ.get("RAY_ADDRESS", "auto")
            raise RecipeError(f"{job}: cannot reach the Ray cluster {address!r}: {last_line(error)}") from error
    return ray


def last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
