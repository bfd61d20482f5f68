"""Why somebody could not take part, in one line."""

from __future__ import annotations


class NotAvailableError(Exception):
    """A contender that cannot run here; the message is the reason."""


def reason(error: BaseException) -> str:
    """The first line of an error, after its type unless it is a NotAvailableError."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = (lines or ["no message"])[0]
    return (first if isinstance(error, NotAvailableError) else f"{type(error).__name__}: {first}")[:300]
