"""Strict YAML 1.2: reading and writing.

Only `true` and `false` are booleans, so that `mixed_precision: no` and `fc: none` are text, and
`1e-4` is a number. Duplicate keys, aliases and tags are errors that name the line.
"""

import re
from typing import Any

import yaml

from starfire_prune.utils.text import NUMBER

__all__ = ["dump_yaml", "parse_yaml"]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 those of YAML 1.2, which are added below

    def fetch_alias(self) -> None:
        text = "a recipe has no aliases or tags: quote text that begins with * or !, as in '*.conv'"
        raise yaml.MarkedYAMLError(problem=text, problem_mark=self.get_mark())

    fetch_tag = fetch_alias

    def scan_to_next_token(self) -> None:  # between tokens of a line, YAML also allows tabs
        super().scan_to_next_token()
        while (
            self.peek() == "\t" and self.buffer[self.pointer - self.column : self.pointer].strip()
        ):
            self.forward()
            super().scan_to_next_token()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value:
            problem = "a key must be a single word"
            if isinstance(key, yaml.ScalarNode):
                name = self.construct_object(key)
                if name not in names:
                    names.add(name)
                    continue
                problem = f"duplicate key {name}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value, 8 if node.value.startswith("0o") else 10)  # 010 is 10, unlike in 1.1


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
for _kind, _text in {
    "null": "(~|null|Null|NULL)?$",
    "bool": "(true|True|TRUE|false|False|FALSE)$",
    "int": "([-+]?[0-9]+|0o[0-7]+)$",
    "float": rf"{NUMBER.pattern}|([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
}.items():
    for _class in (_Loader, _Dumper):  # the dumper quotes text that would be read as one of them
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_text), None)


def parse_yaml(text: str) -> Any:
    """Plain data of a document.

    Raises:
        ValueError: For broken YAML, duplicate keys, aliases and tags, with line and column.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ValueError("not valid YAML: nested too deeply") from None


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
