"""YAML and JSON read strictly: a key that stands twice is an error, and no text can take the reader down.

The parsers themselves let the last of two equal keys win, without a word, follow brackets as deep as they go, and let
aliases multiply.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import yaml

from simmp_fast.messages import one_line, printable, shown

# Far beyond what people write by hand.
MAX_YAML = 2**20  # characters
MAX_DEPTH = 32
MAX_ALIASES = 1000
MAX_NODES = 200_000  # with every alias as long as what it stands for
MAX_SCALAR = 1000  # characters of a number or another value that is no text
MAX_JSON = 2**30  # bytes; manifests of large caches are long


class ConfigError(ValueError):
    """A configuration that cannot be used: names the key, what it got and what it needs. Its text is printable."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class _Loader(yaml.SafeLoader):
    """YAML's plain types; a mapping holds each key once, and there is an end to depth, aliases and length."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._aliases = 0
        self._sizes: dict[yaml.Node, int] = {}  # of finished nodes, aliases written out

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node of the document, counted."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self._aliases += 1
            if self._aliases > MAX_ALIASES:
                raise ConfigError(f"got more than {MAX_ALIASES} aliases (line {event.start_mark.line + 1})")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ConfigError(f"nested too deeply, expected {MAX_DEPTH} levels at most")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if node not in self._sizes:
                raise ConfigError(f"*{shown(event.anchor)[1:-1]}: got an alias inside of what it stands for")
            return node
        self._sizes[node] = size = self._size(node)
        if size > MAX_NODES:
            raise ConfigError(f"got more than {MAX_NODES} values (aliases written out), expected at most as many")
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        """A single value; one that is no text is short."""
        node = super().compose_scalar_node(anchor)
        if node.tag != "tag:yaml.org,2002:str" and len(node.value) > MAX_SCALAR:
            raise ConfigError(f"got a value of {len(node.value)} characters that is no text, expected a short one")
        return node

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

    def _size(self, node: yaml.Node) -> int:
        if isinstance(node, yaml.MappingNode):
            return 1 + sum(self._sizes[part] for pair in node.value for part in pair)
        return 1 + sum(self._sizes[part] for part in node.value) if isinstance(node, yaml.SequenceNode) else 1


def _twice(key: object, where: str) -> ConfigError:
    return ConfigError(f"{one_line(str(key), 100)}: got this key twice, {where}, expected each key of a mapping once")


def parse_yaml(text: str) -> Any:
    """What a YAML document holds; None if it is empty.

    Raises:
        ConfigError: no YAML, a key twice in one mapping (names both lines), or more than the limits of this module:
            length, depth, aliases, values. The message is one line.
    """
    if len(text) > MAX_YAML:
        raise ConfigError(f"got {len(text)} characters, expected at most {MAX_YAML}")
    try:
        return yaml.load(text, _Loader)
    except (ConfigError, MemoryError):
        raise
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_marked(error)) from None
    except Exception as error:  # tags such as !!int meet a wrong text with any kind of exception
        reason = str(error).replace('in "<unicode string>", ', "at ")
        raise ConfigError(one_line(reason or type(error).__name__)) from None


def _marked(error: yaml.MarkedYAMLError) -> str:
    """What is wrong, and where: without the piece of the text that YAML's own message draws."""
    reason = one_line(", ".join(part for part in (error.context, error.problem) if part))
    mark = error.problem_mark or error.context_mark
    return f"{reason} (line {mark.line + 1}, column {mark.column + 1})" if mark else reason


def parse_json(text: str) -> Any:
    """What a JSON document holds.

    Raises:
        ConfigError: no JSON, a key twice in one object (names the line), or nesting deeper than `MAX_DEPTH`.
    """
    too_deep = ConfigError(f"nested too deeply, expected {MAX_DEPTH} levels at most")
    try:
        content = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, text))
    except ConfigError:
        raise
    except RecursionError:
        raise too_deep from None
    except ValueError as error:
        raise ConfigError(one_line(str(error))) from None
    if _deeper_than(content, MAX_DEPTH):
        raise too_deep
    return content


def _deeper_than(content: Any, depth: int) -> bool:
    level = [content]
    for _ in range(depth):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return any(isinstance(node, (dict, list)) for node in level)


def _unique(pairs: list[tuple[str, Any]], text: str) -> dict[str, Any]:
    """The pairs of one object as a mapping.

    A hook is not told where it stands: the lines named are all those in which the key begins a pair.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        written = re.compile(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:")
        lines = [str(number) for number, line in enumerate(text.splitlines(), 1) if written.search(line)]
        listed = ", ".join(lines[:8]) + (", ..." if len(lines) > 8 else "")
        raise _twice(key, f"see line {listed}" if lines else "in one object")
    return found
