"""Entities from the tags of words: the schemes by which files of CoNLL's form mark them; the entities of a sentence.

A tag is a mark and a type, B-PER, or O outside of all entities. Marks: B, I of IOB1 and IOB2 (Tjong Kim Sang, De
Meulder: CoNLL-2003, arXiv:cs/0306050), with E of IOE, with E and S of BIOES; L and U, or M and W, stand for the same in
BILOU, BMES and BMEWO. In either case, before or after the type (NP-B), with "-" or "_"; or alone where there is one
type. Types without marks are read too, where there is an O: then words of one type in a row are one entity.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from distilbert_fast.files.text import refuse_input, visible

OUTSIDE = "O"
_MARK_SETS = ("BIES", "BILU", "BMES", "BMEW")
_SAME = str.maketrans("LUMW", "ESIS")
_FORMS = tuple(
    re.compile(form, re.IGNORECASE | re.DOTALL)
    for separator in "-_"
    for form in (
        rf"(?P<mark>[BIESLUMW])(?:{separator}(?P<kind>.+))?",
        rf"(?:(?P<kind>.+){separator})?(?P<mark>[BIESLUMW])",
    )
)
_WITHOUT_MARKS = re.compile(r"(?P<kind>(?P<mark>)\w{2}.*)", re.DOTALL)

_NO_TYPE = re.compile(r"[BIESLUMW][-_]|[-_][BIESLUMW]", re.IGNORECASE)


@dataclass(frozen=True)
class Scheme:
    """How tags are written.

    Attributes:
        form: matches a tag that is not outside: its mark, none where runs of one type are entities, and its type.
    """

    form: re.Pattern[str]

    def split(self, tag: str) -> tuple[str, str]:
        """Mark, one of B, I, E, S and O, and type of a tag; tags that are not of the scheme are outside."""
        found = None if is_outside(tag) else self.form.fullmatch(tag)
        if found is None:
            return OUTSIDE, ""
        return (found["mark"] or "I").upper().translate(_SAME), found["kind"] or ""

    def entities(self, tags: Sequence[str]) -> set[tuple[str, int, int]]:
        """Type, first word and the word after the last of each entity of a sentence.

        As CoNLL's own script and seqeval read them: an I or E that continues no entity of its type begins one; B and S
        always do; E and S end theirs.
        """
        found: set[tuple[str, int, int]] = set()
        current: tuple[str, int] | None = None  # type and first word of the entity that may go on
        for at, tag in enumerate([*tags, OUTSIDE]):
            mark, kind = self.split(tag)
            if current is not None and not (mark in ("I", "E") and kind == current[0]):
                found.add((*current, at))
                current = None
            if current is None and mark != OUTSIDE:
                current = kind, at
            if current is not None and mark in ("E", "S"):
                found.add((*current, at + 1))
                current = None
        return found


def is_outside(tag: str) -> bool:
    return tag.upper() == OUTSIDE


def scheme_of(tags: Iterable[str]) -> Scheme | None:
    """Return the scheme that all tags follow; None if they mark no entities."""
    names = set(tags)
    inside = {tag for tag in names if not is_outside(tag)}
    if not inside:
        return None
    for form in _FORMS:
        found = [match for tag in inside if (match := form.fullmatch(tag))]
        marks = {match["mark"].upper() for match in found}
        told = bool(marks & {"B", "I"}) or all(match["kind"] for match in found)  # S alone may be anything
        if len(found) == len(inside) and told and any(marks <= set(known) for known in _MARK_SETS):
            return Scheme(form)
    if len(inside) < len(names) and not _marked(inside) and all(map(_WITHOUT_MARKS.fullmatch, inside)):
        return Scheme(_WITHOUT_MARKS)
    return None


def refuse_odd_tag(place: str, tag: str) -> None:
    """Raise ValueError, which begins with `place`, for a tag that looks like another one, or has a mark and no type."""
    if visible(tag) != tag:
        refuse_input(place, "a tag of visible characters", ascii(tag))
    if _NO_TYPE.fullmatch(tag):
        refuse_input(place, "a tag with a type, such as B-PER", repr(tag))


def odd_one(tags: Collection[str]) -> str | None:
    """Return a tag that breaks the scheme which the tags seem to follow; None if no tag does, or they follow none."""
    scheme = scheme_of(tags)
    inside = sorted(tag for tag in tags if not is_outside(tag))
    if scheme is None:
        if any(re.match(r"[BI](-|\W.)", tag) for tag in inside) or (len(inside) < len(tags) and _marked(inside)):
            counts = [(sum(form.fullmatch(tag) is not None for tag in inside), form) for form in _FORMS]
            most = max(counts, key=lambda pair: pair[0])[1]
            return next((tag for tag in inside if not most.fullmatch(tag)), inside[0])
        return next((tag for tag in inside if re.fullmatch(r"\(.+\*\)?|\*\)?", tag)), None)  # brackets of CoNLL-2012
    kinds: dict[str, str] = {}
    cases: dict[str, str] = {}
    for tag in sorted(tags):
        if cases.setdefault(tag.casefold(), tag) != tag:
            return tag
    for tag in inside:
        kind = scheme.split(tag)[1]
        if kinds.setdefault(kind.casefold(), kind) != kind:
            return tag
    return None


def _marked(tags: Collection[str]) -> list[str]:
    """The tags that have a mark of IOB, whatever separates it from the type."""
    return [tag for tag in tags if re.match(r"[BI][\W_].", tag, re.IGNORECASE) or re.search(r".[\W_][BI]$", tag)]
