"""Reads YAML documents that people write; JSON is YAML, too. A mistake is one sentence that names its place."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

import yaml

from gpuslice.errors import ConfigError

_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """PyYAML silently keeps the last of two equal keys, so that a setting is lost. Here two equal keys are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        lines: dict[object, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge":
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise yaml.constructor.ConstructorError(
                        None,
                        None,
                        f"key {key.value!r} is in line {lines[name]}, too; keep one",
                        key.start_mark,
                    )
                lines[name] = line
        return super().construct_mapping(node, deep=deep)


def read(path: Path, what: str, page: str) -> object:
    """The document in this file; None if it is empty. A ConfigError begins with `what` and refers to `page`."""
    name = f"{what} {_shown(path)}"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise ConfigError(f"{name} does not exist; check the path") from e
    except IsADirectoryError as e:
        raise ConfigError(f"{name} is a folder; name the file in it") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{name} is not UTF-8 text (byte {e.start}); write it as text, see {page}") from e
    except (OSError, ValueError) as e:  # ValueError: a path with a null byte
        raise ConfigError(
            f"{name} cannot be read ({getattr(e, 'strerror', e)}); check its permissions and its path"
        ) from e
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.constructor.ConstructorError as e:
        raise ConfigError(f"{name}, {_place(e)}; see {page}") from e
    except yaml.MarkedYAMLError as e:
        raise ConfigError(f"{name} is not YAML, {_place(e)}; see {page}") from e
    # ValueError: YAML takes 2026-13-01 for a date, and Python cannot read a number of 5,000 digits.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as e:
        raise ConfigError(f"{name} is not YAML: {' '.join(str(e).split())}; see {page}") from e


def _shown(path: Path) -> str:
    """The path in one line."""
    return "\\n".join(str(path).splitlines())


def _place(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}" if mark is not None else "somewhere"
    return f"{where}: {' '.join(str(error.problem or error.context).split())}"
