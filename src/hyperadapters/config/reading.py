"""Reading YAML without its surprising conversions, and within limits."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import yaml

from hyperadapters.utils.reading import MAX_DEPTH

BOOL = "tag:yaml.org,2002:bool"
MERGE = "tag:yaml.org,2002:merge"
STR = "tag:yaml.org,2002:str"

MAX_CHARACTERS = 10_000_000
"""Maximum length of a document."""
MAX_VALUES = 1_000_000
"""Maximum number of keys and values of a document, where those of an alias are counted each time."""


class _Size(NamedTuple):
    """Size of a part of a document.

    Attributes:
        values: Number of keys and values.
        depth: Number of levels.
    """

    values: int
    depth: int


class _Loader(yaml.SafeLoader):
    """Loader that refuses duplicate keys and reads keys, and yes, no, on and off, as strings (YAML 1.2).

    It refuses tags, and documents that are large or deep when their aliases are replaced by what they stand for.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != BOOL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._size, self._level = _Size(0, 0), 0
        self._sizes: dict[int, _Size] = {}
        """Sizes of the nodes that have been read, by their id."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self._check_tag(event)
        outer = self._size
        self._level += 1
        self._size = _Size(outer.values + 1, 0)
        self._check_size(event)
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            self._add_alias(event, node)
        else:
            self._sizes[id(node)] = _Size(self._size.values - outer.values, self._size.depth + 1)
        self._level -= 1
        self._size = _Size(self._size.values, max(outer.depth, self._sizes[id(node)].depth))
        return node

    def _add_alias(self, event: Any, node: Any) -> None:
        size = self._sizes.get(id(node))
        if size is None:
            raise _fault(f"the alias *{event.anchor} stands for a value that contains it; remove it", event)
        self._size = _Size(self._size.values + size.values, size.depth)
        self._check_size(event)

    def _check_size(self, event: Any) -> None:
        if self._size.values > MAX_VALUES:
            raise _fault(f"expected at most {MAX_VALUES} keys and values, found more, with those of aliases", event)
        if max(self._level, self._level + self._size.depth - 1) > MAX_DEPTH:
            raise _fault(f"expected at most {MAX_DEPTH} levels of nested keys and lists, found more", event)

    def _check_tag(self, event: Any) -> None:
        if getattr(event, "tag", None) not in (None, "!", STR):
            raise _fault(f"the tag '{event.tag}' is not supported; remove it", event)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _fault("expected a string as a key", key)
            if key.tag == MERGE:
                continue
            key.tag = STR
            if key.value in seen:
                raise _fault(f"the key '{key.value}' is given twice; remove one of them", key)
            seen.add(key.value)
        return node


def _fault(message: str, place: Any) -> yaml.YAMLError:
    return yaml.composer.ComposerError(None, None, message, place.start_mark)


_Loader.add_implicit_resolver(BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def load_yaml(text: str) -> Any:
    """Parse a YAML document.

    Args:
        text: The document.

    Returns:
        The value of the document, which consists of mappings, lists and scalars.

    Raises:
        YAMLError: If the text is not YAML, is longer, larger or deeper than the limits of this module, or has a
            duplicate key or a tag. The message contains the line and column.
        ValueError: If a scalar looks like a date or a number, but is none.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"expected at most {MAX_CHARACTERS} characters, found more; split the file with extends")
    return yaml.load(text, _Loader)  # a SafeLoader
