"""What a command line names by patterns."""

from __future__ import annotations

import fnmatch


def chosen(option: str, patterns: str, names: list[str]) -> list[str]:
    """The names that a pattern matches and no !pattern does, in their own order."""
    parts = [part.strip() for part in patterns.split(",") if part.strip()]
    wanted = [part for part in parts if not part.startswith("!")] or ["*"]
    unwanted = [part[1:] for part in parts if part.startswith("!")]
    for part in (*wanted, *unwanted):
        if not fnmatch.filter(names, part):
            raise ValueError(f"{option}: expected some of {', '.join(names)}, got {part!r}")
    return [
        name
        for name in names
        if any(fnmatch.fnmatchcase(name, part) for part in wanted)
        and not any(fnmatch.fnmatchcase(name, part) for part in unwanted)
    ]
