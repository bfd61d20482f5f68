"""What a command says when it cannot go on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import typer


@contextlib.contextmanager
def plain_errors(when_interrupted: str) -> Iterator[None]:
    """One line on stderr for what a user can mend: input, disk, a forced backend. A bug keeps its trace."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\ninterrupted; {when_interrupted}", file=sys.stderr)
        raise typer.Exit(130) from None
    except Exception as error:
        ours = type(error).__module__.partition(".")[0] == "distilbert_fast"
        if not ours and not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
