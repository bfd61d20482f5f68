"""What a command says when it cannot go on."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

import typer

_PATIENCE = 5.0  # seconds in which a launcher ends the other processes of one that failed


@contextlib.contextmanager
def plain_errors(when_interrupted: str) -> Iterator[None]:
    """One line on stderr for what a user can mend: input, disk, a forced backend. A bug keeps its trace.

    Of several processes the first says what all of them met; another one speaks if it is still there after that.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        yield
    except KeyboardInterrupt:
        if is_first:
            print(f"\ninterrupted; {when_interrupted}", file=sys.stderr)
        raise typer.Exit(130) from None
    except Exception as error:
        ours = type(error).__module__.partition(".")[0] == "distilbert_fast"
        if not ours and not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        if not is_first:
            time.sleep(_PATIENCE)
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
