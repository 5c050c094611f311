"""Strict YAML 1.2: reading and writing.

Only `true` and `false` are booleans, so that `mixed_precision: no` and `fc: none` are text, and
`1e-4` is a number. Duplicate keys, aliases and tags are errors that name the line.
"""

import re
from typing import Any

import yaml

from starfire_prune.utils.text import NUMBER

__all__ = ["dump_yaml", "parse_yaml"]


def parse_yaml(text: str) -> Any:
    """Plain data of a document.

    Raises:
        ValueError: For broken YAML, duplicate keys, aliases and tags, with line and column.
    """
    try:
        for event in yaml.parse(text, Loader=yaml.BaseLoader):
            if isinstance(event, yaml.AliasEvent):
                raise _yaml_error(event.start_mark, "a recipe has no aliases")
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        return None if node is None else _value_of(node)
    except yaml.MarkedYAMLError as error:
        raise _yaml_error(error.problem_mark, error.problem) from None
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ValueError("not valid YAML: nested too deeply") from None


def _yaml_error(mark: Any, problem: str | None) -> ValueError:
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return ValueError(f"{where}not valid YAML: {problem}")


def _value_of(node: Any) -> Any:
    if node.tag not in [f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")]:
        raise _yaml_error(node.start_mark, f"a recipe has no tags such as {node.tag}")
    if isinstance(node, yaml.SequenceNode):
        return [_value_of(item) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        return node.value if node.style else _scalar(node.value)
    mapping: dict[Any, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _yaml_error(key.start_mark, "a key must be a single word")
        name = _value_of(key)
        if name in mapping:
            raise _yaml_error(key.start_mark, f"duplicate key {name}")
        mapping[name] = _value_of(value)
    return mapping


def _scalar(text: str) -> object:
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?[0-9]+", text):
        return int(text)
    if NUMBER.match(text):
        return float(text)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        return float(text.replace(".", ""))
    return text


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


# Text that YAML 1.2 reads as a number and PyYAML doesn't, so that it is quoted when written
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def dump_yaml(tree: Any) -> str:
    """Plain data as YAML that `parse_yaml` reads back, with the innermost level in one line."""
    return yaml.dump(
        tree,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=100,
    )
