"""The bodies of requests: what clients send, checked by pydantic, each field named where it is at fault."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, PlainValidator, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from distilbert_fast.files.text import shortened
from distilbert_fast.serving.http.errors import Refused


class Inputs(NamedTuple):
    """What is asked about.

    Attributes:
        rows: a text each, a pair of texts, or the ids of a text's tokens.
        single: one row was given, and not a list of one.
    """

    rows: list[Any]
    single: bool


def _refuse(expected: str, given: Any, at: str = "") -> PydanticCustomError:
    place = f"{at}: " if at else ""
    words = f"{place}expected {expected}, got {shortened(given)}"
    return PydanticCustomError("expected", "{words}", {"words": words})


def _is_ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(one) is int for one in given)


def _texts(given: Any) -> Inputs:
    """A text or the ids of one, or a list of those."""
    if isinstance(given, str) or _is_ids(given):
        return Inputs([given if isinstance(given, str) else tuple(given)], True)
    if not isinstance(given, list) or not given:
        raise _refuse("a text, or a list of one or more", given)
    for at, one in enumerate(given):
        if not isinstance(one, str) and not _is_ids(one):
            raise _refuse("a text", one, f"[{at}]")
    return Inputs([one if isinstance(one, str) else tuple(one) for one in given], False)


def _plain_texts(given: Any) -> Inputs:
    """A text or a list of texts."""
    if isinstance(given, str):
        return Inputs([given], True)
    if not isinstance(given, list) or not given:
        raise _refuse("a text, or a list of one or more", given)
    for at, one in enumerate(given):
        if not isinstance(one, str):
            raise _refuse("a text", one, f"[{at}]")
    return Inputs(given, False)


def _texts_or_pairs(given: Any) -> Inputs:
    """A text, [text] or [text, text], or a list of lists with one or two texts each."""
    if isinstance(given, list) and given and isinstance(given[0], list):
        return Inputs([_text_or_pair(one, f"[{at}]") for at, one in enumerate(given)], False)
    return Inputs([_text_or_pair(given, "")], True)


def _text_or_pair(given: Any, at: str) -> Any:
    if isinstance(given, str) and not at:
        return given
    if isinstance(given, list) and len(given) in (1, 2) and all(isinstance(one, str) for one in given):
        return given[0] if len(given) == 1 else tuple(given)
    batch = "" if at else ", or a list with such lists"
    raise _refuse(f"{'' if at else 'a text, '}[text] or a pair [text, text]{batch}", given, at)


def _questions(given: Any) -> Inputs:
    """A question with its context, or a list of them."""
    many = given if isinstance(given, list) else [given]
    if not many:
        raise _refuse('{"question": …, "context": …}, or a list of one or more', given)
    for at, one in enumerate(many):
        fits = isinstance(one, dict) and one.keys() == {"question", "context"}
        if not fits or not all(isinstance(text, str) for text in one.values()):
            raise _refuse('{"question": a text, "context": a text}', one, f"[{at}]" if many is given else "")
    return Inputs([(one["question"], one["context"]) for one in many], many is not given)


_TEXT = {"type": "string"}
_IDS = {"type": "array", "items": {"type": "integer"}}
_LIST = {"type": "array", "items": _TEXT}
_QUESTION = {"type": "object", "properties": {"question": _TEXT, "context": _TEXT}}


def _schema(*kinds: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(kinds)})


TextInputs = Annotated[
    Inputs,
    PlainValidator(_texts),
    _schema(_TEXT, _IDS, {"type": "array", "items": {"anyOf": [_TEXT, _IDS]}}),
]
PlainTexts = Annotated[Inputs, PlainValidator(_plain_texts), _schema(_TEXT, _LIST)]
TextsOrPairs = Annotated[
    Inputs, PlainValidator(_texts_or_pairs), _schema(_TEXT, _LIST, {"type": "array", "items": _LIST})
]
QuestionInputs = Annotated[
    Inputs, PlainValidator(_questions), _schema(_QUESTION, {"type": "array", "items": _QUESTION})
]


class Strict(BaseModel):
    """No field beside those named, and no number where a text is expected."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Body(Strict):
    """Of any request. ``model``: its name; by default the first that has what is asked for."""

    model: str | None = None


class _Cut(Strict):
    """What texts that are too long become. ``truncate``: they are cut, at the end; else they are refused."""

    truncate: bool | None = None
    truncation_direction: Literal["right", "Right"] = "right"
    prompt_name: None = Field(default=None, description="Prompts are put before the texts by the client.")


class EmbedBody(Body, _Cut):
    inputs: TextInputs
    normalize: bool = True
    dimensions: int | None = Field(default=None, ge=1)


class EmbedAllBody(Body, _Cut):
    inputs: TextInputs


class RerankBody(Body, _Cut):
    query: str
    texts: Annotated[list[str], FailFast()] = Field(min_length=1)
    raw_scores: bool = False
    return_text: bool = False


class PredictBody(Body, _Cut):
    inputs: TextsOrPairs
    raw_scores: bool = False


class Sentences(Strict):
    source_sentence: str
    sentences: Annotated[list[str], FailFast()] = Field(min_length=1)


class SimilarityBody(Body):
    inputs: Sentences
    parameters: _Cut | None = None


class TokenizeBody(Body):
    inputs: PlainTexts
    add_special_tokens: bool = True
    prompt_name: None = None


class TagParameters(_Cut):
    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "simple"
    ignore_labels: Annotated[list[str], FailFast()] = ["O"]


class TagBody(Body):
    inputs: PlainTexts
    parameters: TagParameters | None = None


class AnswerParameters(Strict):
    top_k: int = Field(default=1, ge=1, le=1000)
    max_answer_len: int = Field(default=15, ge=1, le=1000)
    handle_impossible_answer: bool = False
    align_to_words: bool = True


class QuestionBody(Body):
    inputs: QuestionInputs
    parameters: AnswerParameters | None = None


class OpenAIBody(Strict):
    model: str
    input: TextInputs
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)
    user: str | None = None


_Given = TypeVar("_Given", bound=BaseModel)


def body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says of a route with such a body."""
    content = {"application/json": {"schema": kind.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def read_body(kind: type[_Given], content: bytes) -> _Given:
    """A body from its bytes.

    Raises:
        Refused: 400 for what is no JSON, 422 with the field for another body than is expected.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    words = first["msg"]
    if first["type"] == "json_invalid":
        raise Refused(400, f"expected JSON in UTF-8: {words.removeprefix('Invalid JSON: ')}", "body")
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "expected":
        at, _, rest = words.partition(": ") if words.startswith("[") else ("", "", words)
        raise Refused(422, rest, f"{place}{at}")
    if first["type"] == "missing":
        raise Refused(422, "expected, and not there", place)
    if first["type"] == "extra_forbidden":
        known = ", ".join(kind.model_fields)
        raise Refused(422, f"expected none of that name; the body has {known}" if "." not in place else words, place)
    raise Refused(422, f"{words}, got {shortened(first['input'])}", place or "body")
