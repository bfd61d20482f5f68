"""Jobs that are over sooner, for tests that ask nothing of how fast models are."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from distilbert_fast.evaluation import speed

time_calls = speed.time_calls


def one_turn(models: Any, inputs: Any, turns: int) -> dict[str, list[list[float]]]:
    """Instead of `speed.time_calls`: every clock is read, but once."""
    return time_calls(models, inputs, 1)


def before_forks(set_attribute: Callable[[Any, str, Any], Any] = setattr) -> None:
    """Import what a job imports only when it comes to it, seconds for every fork; let clocks and pictures be short.

    What is loaded by now is hidden from the garbage collector, which jobs run after each stage.
    """
    import matplotlib.backends.backend_agg
    import matplotlib.figure
    import scipy.stats  # noqa: F401
    import sklearn.metrics  # noqa: F401

    from distilbert_fast.compression import quantize  # noqa: F401
    from distilbert_fast.data import corpus, masking  # noqa: F401
    from distilbert_fast.distillation import student, trainer  # noqa: F401
    from distilbert_fast.evaluation import distillation_report, report  # noqa: F401
    from distilbert_fast.jobs import demo, distill  # noqa: F401

    gc.freeze()
    set_attribute(speed, "time_calls", one_turn)
    set_attribute(matplotlib.figure.Figure, "savefig", lambda figure, file, **options: file.write(b"no picture"))
