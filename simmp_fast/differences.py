"""What differs between two nested mappings, such as configurations, and how messages say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simmp_fast.messages import one_line, shown

_ABSENT = object()
_LISTED = 8  # differences that a message names


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def differences(saved: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ, with the saved value and the one found."""
    one, other = flatten(saved), flatten(found)
    pairs = {key: (one.get(key, _ABSENT), other.get(key, _ABSENT)) for key in {**one, **other}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def listed(found: Mapping[str, tuple[Any, Any]]) -> str:
    """``"train.lr is 0.001, saved as 0.0001; ..."`` for what `differences` returned."""
    said = [f"{one_line(key, 100)} {_is(other)}, {_saved(one)}" for key, (one, other) in found.items()]
    return "; ".join(said if len(said) <= _LISTED else [*said[:_LISTED], f"and {len(said) - _LISTED} more"])


def _is(value: Any) -> str:
    return "is missing" if value is _ABSENT else f"is {shown(value)}"


def _saved(value: Any) -> str:
    return "not saved" if value is _ABSENT else f"saved as {shown(value)}"
