"""Reading YAML without its surprising conversions."""

from __future__ import annotations

import re
from typing import Any

import yaml

BOOL = "tag:yaml.org,2002:bool"
MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Loader that refuses duplicate keys and reads keys, and yes, no, on and off, as strings (YAML 1.2)."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != BOOL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.composer.ComposerError(None, None, "expected a string as a key", key.start_mark)
            if key.tag == MERGE:
                continue
            key.tag = "tag:yaml.org,2002:str"
            if key.value in seen:
                raise yaml.composer.ComposerError(
                    None, None, f"the key '{key.value}' is given twice; remove one of them", key.start_mark
                )
            seen.add(key.value)
        return node


_Loader.add_implicit_resolver(BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def load_yaml(text: str) -> Any:
    """Parse a YAML document.

    Args:
        text: The document.

    Returns:
        The value of the document, which consists of mappings, lists and scalars.

    Raises:
        YAMLError: If the text is not YAML or a mapping has a duplicate key. The message contains the line and column.
    """
    return yaml.load(text, _Loader)  # a SafeLoader
