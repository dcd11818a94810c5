"""``ConfigError``, and lines for what pydantic finds: the path as the user wrote it, the
value, the bound and the fix."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

TYPES = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "model_type": "an object",
    "model_attributes_type": 'an object such as {"type": "suffix"}',
}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlist = _SHORT.maxtuple = 12


class ConfigError(ValueError):
    """The user's configuration cannot work. Lists every problem, not the first."""


def error(
    text: str, kind: Literal["wrong", "missing"] = "wrong"
) -> PydanticCustomError:
    """What a validator raises; ``text`` follows the path and, if it is wrong, the value."""
    return PydanticCustomError(kind, "{text}", {"text": text})


def at(path: Sequence[str | int], value: Any, text: str) -> InitErrorDetails:
    """One of several problems that a validator found below its own value."""
    return InitErrorDetails(type=error(text), loc=tuple(path), input=value)


def raise_all(problems: list[InitErrorDetails]) -> None:
    if problems:
        raise ValidationError.from_exception_data("treespec", problems)


def lines(
    found: Sequence[Mapping[str, Any]],
    raw: Any,
    where: str,
    known: Mapping[str, Collection[str]],
) -> list[str]:
    """One for each problem of ``raw``.

    Args:
        found: as ``ValidationError.errors`` lists them.
        where: what the user calls ``raw``.
        known: names that are right, by the name or type of the object they stand in;
            those of ``raw`` itself under "".
    """
    return [_line(each, raw, where, known) for each in found]


def shown(value: Any) -> str:
    """The value, cut to what fits into a line."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python prints integers of 4300 digits at most
        return f"<{type(value).__name__} too large to print>"


def hint(word: object, known: Collection[str]) -> str:
    close = difflib.get_close_matches(str(word)[:99], list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def unknown(key: object, where: str, known: Collection[str]) -> str:
    if same_name(key) in known:
        return f"{key} in {where}: is given twice, with dashes and underscores"
    close = hint(same_name(key), known) or f"; known: {sorted(known)}"
    return f"unknown option {shown(key)} in {where}{close}"


def one_of(value: object, choices: Collection[str]) -> str:
    return f"must be one of {list(choices)}" + hint(value, choices)


def same_name(key: Any) -> Any:
    """The name of an option; dashes are as good as underscores, as in vLLM's flags."""
    return key.replace("-", "_") if isinstance(key, str) else key


def _line(
    found: Mapping[str, Any],
    raw: Any,
    where: str,
    known: Mapping[str, Collection[str]],
) -> str:
    kind, value, loc = found["type"], found["input"], found["loc"]
    if kind == "extra_forbidden":
        inside = next((each for each in reversed(loc[:-1]) if each in known), "")
        return unknown(loc[-1], _path(loc[:-1], raw) or where, known[inside])
    path = _path(loc, raw) or where
    if kind == "missing":
        reason = found.get("ctx", {}).get("text", "it has no default")
        return f"{path} is missing: {reason}"
    if kind == "union_tag_not_found":
        return f"{path}.type is missing: {one_of('', known['type'])}"
    if kind == "union_tag_invalid":
        tag = value["type"]
        return f"{path}.type={shown(tag)}: {one_of(tag, known['type'])}"
    if kind == "literal_error":
        text = one_of(value, re.findall(r"'(\w+)'", found["ctx"]["expected"]))
    elif kind == "string_too_short":
        text = "must not be empty"
    else:
        text = f"must be {TYPES[kind]}" if kind in TYPES else found["msg"]
    return f"{path}={shown(value)}: {text}"


def _path(loc: Sequence[str | int], raw: Any) -> str:
    """The way to a value, with the user's names; pydantic adds the types of objects."""
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
            raw = raw[step] if isinstance(raw, list | tuple) else None
        elif not (isinstance(raw, Mapping) and raw.get("type") == step):
            names = raw if isinstance(raw, Mapping) else ()
            name = next((name for name in names if same_name(name) == step), step)
            path += f".{name}" if path else str(name)
            raw = raw.get(name) if isinstance(raw, Mapping) else None
    return path
