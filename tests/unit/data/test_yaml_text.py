"""A key that stands twice is refused, at any depth; merged keys may be set anew."""

from __future__ import annotations

import pytest
import yaml

from longvila.data.yaml_text import load_yaml


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "x: {a: 1, a: 1}", "- {a: 1, b: 2, a: 3}"])
def test_twice_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match=r"the key 'a' stands twice\n  in .*line"):
        load_yaml(text)


def test_plain_values_and_merged_keys() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: [1, two, null]"
    assert load_yaml(text) == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 3, "y": 2},
        "c": [1, "two", None],
    }
