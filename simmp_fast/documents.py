"""YAML and JSON read strictly: a key that stands twice is an error, and no text can take the reader down.

The parsers themselves let the last of two equal keys win, without a word.
"""

from __future__ import annotations

import json
import re
import reprlib
from typing import Any

import yaml

_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 3, 200, 200
_short.maxdict = _short.maxlist = _short.maxtuple = 12


def shown(value: object) -> str:
    """A value as messages show it: its `repr`, cut where it is long. With YAML's aliases that could be endless."""
    try:
        return _short.repr(value)
    except ValueError:  # Python refuses to write out an int of thousands of digits
        return f"a value of type {type(value).__name__} that is too long to show"


class ConfigError(ValueError):
    """A configuration that cannot be used: names the key, what it got and what it needs."""


class _Loader(yaml.SafeLoader):
    """YAML's plain types; a mapping holds each key once."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """A mapping as it is written, before merge keys are resolved."""
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            value, line = self.construct_object(key), key.start_mark.line + 1
            if value in lines:
                raise _twice(value, f"in line {lines[value]} and in line {line}")
            lines[value] = line
        return node


def _twice(key: object, where: str) -> ConfigError:
    return ConfigError(f"{key}: got this key twice, {where}, expected each key of a mapping once")


def parse_yaml(text: str) -> Any:
    """What a YAML document holds; None if it is empty.

    Raises:
        ConfigError: no YAML, a key twice in one mapping (names both lines), or nesting without end.
    """
    try:
        return yaml.load(text, _Loader)
    except (ConfigError, MemoryError):
        raise
    except RecursionError:
        raise ConfigError("nested too deeply") from None
    except Exception as error:  # tags such as !!int meet a wrong text with any kind of exception
        raise ConfigError(str(error) or type(error).__name__) from None


def parse_json(text: str) -> Any:
    """What a JSON document holds.

    Raises:
        ConfigError: no JSON, a key twice in one object (names the line), or nesting without end.
    """
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, text))
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError("nested too deeply") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _unique(pairs: list[tuple[str, Any]], text: str) -> dict[str, Any]:
    """The pairs of one object as a mapping.

    A hook is not told where it stands: the lines named are all those in which the key begins a pair.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        key = next(key for key in keys if keys.count(key) > 1)
        written = re.compile(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:")
        lines = [str(number) for number, line in enumerate(text.splitlines(), 1) if written.search(line)]
        raise _twice(key, f"see line {', '.join(lines)}" if lines else "in one object")
    return found
