"""JSON without what Python's reader lets pass: names given twice, NaN and Infinity."""

from __future__ import annotations

import json
from typing import Any

from vllm_treespec.config_errors import ConfigError, shown


def read_object(text: str, where: str = "the configuration") -> dict[str, Any]:
    """
    Raises:
        ConfigError: if the text is no JSON object, or none that means one thing.
    """
    try:
        found = json.loads(
            text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{where}: is nested too deep") from None
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON: {error}: {shown(text)}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where}={shown(found)}: must be a JSON object")
    return found


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(f"{name!r} is given twice, give it once")
        found[name] = value
    return found


def _no_constant(name: str) -> None:
    raise ConfigError(f"{name} is no number")
