"""YAML as people write it into files: a key that stands twice is an error.

YAML forbids it, and PyYAML takes the last one without a word, so that a setting further up is lost.
Merged keys (``<<``) may be set anew.
"""

from __future__ import annotations

from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """Read plain values from YAML.

    Args:
        text: One document.

    Raises:
        yaml.YAMLError: If it is no YAML, or a mapping has a key twice.
    """
    return yaml.load(text, Loader=_Loader)
