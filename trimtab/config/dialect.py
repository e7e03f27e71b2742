"""Reading a config as people write it: YAML or JSON text, a dict, `key=value` words, each value with its place.

Knows the dialect's syntax only. What a key means is the business of `keys.py` and `resolve.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One key with its value as parsed, its text as written (scalars of YAML and the command line), and its place."""

    key: str
    value: Any
    where: str
    text: str | None = None


_WINDOWS_PATH = re.compile(r"^[A-Za-z]:[\\/]")


def read(path: Path) -> list[Entry]:
    """The top-level keys of a YAML or JSON file, in order.

    Raises:
        ConfigError: no such file, not UTF-8, malformed, not a mapping, or a key twice; with the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"no config file {str(path)!r}", where=str(path.absolute()), remedy="check the path"
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise ConfigError(
                f"{path.name} is not UTF-8 text",
                where=str(path),
                why=f"byte 0x{error.object[error.start]:02x} at offset {error.start} (line "
                f"{error.object.count(bytes([10]), 0, error.start) + 1}) begins no character",
                remedy="save the file as UTF-8 and try again",
            ) from None
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"cannot read {str(path)[:200]!r} as a config file: {why}",
            where=str(path.absolute())[:400],
            remedy="name a YAML or JSON file that you may read",
        ) from None
    return list(_json(text, str(path)) if path.suffix.lower() == ".json" else _yaml(text, str(path)))


def _yaml(text: str, name: str) -> Iterator[Entry]:
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{Path(name).name} holds a character that no text file has: U+{ord(text[error.position]):04X}",
            where=f"{name}:{line}",
            why="it is probably not a text file, or was damaged",
            remedy="write that line anew",
        ) from None
    try:
        root = loader.get_single_node()
        if root is None:
            raise ConfigError(f"{Path(name).name} is empty", where=name, remedy="write at least model_name_or_path")
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(
                f"{Path(name).name} is not a list of `key: value` lines",
                where=f"{name}:{root.start_mark.line + 1}",
                remedy="write one `key: value` per line",
            )
        _refuse_duplicates(root, name)
        loader.flatten_mapping(root)  # `<<: *other`: merged pairs come first, the file's own override them
        entries: dict[str, Entry] = {}
        for key_node, value_node in root.value:
            key = str(key_node.value)
            written = value_node.value if isinstance(value_node, yaml.ScalarNode) else None
            where = f"{name}:{key_node.start_mark.line + 1}: {key}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(
                    f"{Path(name).name} has a list or mapping where a key should be",
                    where=f"{name}:{key_node.start_mark.line + 1}",
                    remedy="write one `key: value` per line",
                )
            entries[key] = Entry(key=key, value=_construct(loader, value_node, where), where=where, text=written)
    except RecursionError:
        raise ConfigError(
            f"{Path(name).name} is nested too deep to be read",
            where=name,
            why="lists within lists without end, or an anchor that holds itself",
            remedy="write the values out; no key takes more than a list",
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if error.context == "while scanning a simple key":  # the line without a colon, not the one after it
            mark = error.context_mark or mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(
            f"{Path(name).name} is not valid YAML: {error.problem or error}",
            where=where,
            why=f"column {mark.column + 1}: {_line(text, mark.line)!r}" if mark else "",
            remedy="indent with spaces, put a space after each colon, and quote text that holds `: ` or `#`",
        ) from None
    finally:
        loader.dispose()
    yield from entries.values()


def _construct(loader: yaml.SafeLoader, node: yaml.Node, where: str) -> Any:
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, OverflowError) as error:  # what looks like a date or number and is none
        raise ConfigError(
            f"{where.rpartition(': ')[2]}: its value cannot be read: {error}",
            where=where,
            why="YAML takes it for a number or a date",
            remedy="put it in quotes if it is text, else correct it",
        ) from None


def _line(text: str, number: int) -> str:
    lines = text.splitlines()
    return lines[number].strip() if number < len(lines) else ""


def _refuse_duplicates(node: yaml.Node, name: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_duplicates(child, name)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if isinstance(key_node, yaml.ScalarNode):
            _refuse_second(seen, key_node.value, line, name)
        _refuse_duplicates(value_node, name)


def _refuse_second(seen: dict[str, int], key: str, line: int, name: str) -> None:
    if key in seen and key != "<<":
        raise ConfigError(
            f"{key} is written twice",
            where=f"{name}:{line}: {key}",
            why=f"it already stands in line {seen[key]}, and only one of the two could act",
            remedy="delete one of them",
        )
    seen[key] = line


_JSON_GAP = re.compile(r"\s*")


def _json(text: str, name: str) -> Iterator[Entry]:
    """The top level is walked by hand because the json module does not say where a key stands."""
    decoder = json.JSONDecoder()
    position = _JSON_GAP.match(text).end()  # type: ignore[union-attr]  # matches the empty string too

    def skip(at: int) -> int:
        match = _JSON_GAP.match(text, at)
        return match.end() if match else at

    try:
        if not isinstance(json.loads(text), dict):
            raise ConfigError(
                f"{Path(name).name} is not a JSON object", where=f"{name}:1", remedy='write {"key": value, ...}'
            )
        seen: dict[str, int] = {}
        position = skip(position + 1)
        while text[position] != "}":
            line = text.count("\n", 0, position) + 1
            key, position = decoder.raw_decode(text, position)
            value, position = decoder.raw_decode(text, skip(skip(position) + 1))
            _refuse_second(seen, key, line, name)
            yield Entry(key=key, value=value, where=f"{name}:{line}: {key}")
            position = skip(position)
            if text[position] == ",":
                position = skip(position + 1)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{Path(name).name} is not valid JSON: {error.msg}",
            where=f"{name}:{error.lineno}",
            why=f"column {error.colno}: {_line(text, error.lineno - 1)!r}",
            remedy='keys and text stand in "double quotes"; no comments, no comma after the last value, true and false in small '
            "letters, and every backslash doubled",
        ) from None
    except (RecursionError, ValueError) as error:
        why = "lists within lists without end" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(
            f"{Path(name).name} cannot be read as JSON",
            where=name,
            why=why,
            remedy="write plain values and short lists",
        ) from None


def from_mapping(values: Mapping[str, Any]) -> list[Entry]:
    """The entries of a dict given by a program."""
    return [Entry(key=str(key), value=value, where=f"argument: {key}") for key, value in values.items()]


def overrides(words: Sequence[str]) -> list[Entry]:
    """`key=value`, `--key=value`, `--key value` and `--switch`, in any mixture; a later word wins.

    Raises:
        ConfigError: a word that is none of these.
    """
    entries: dict[str, Entry] = {}
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        name, equals, text = word.partition("=")
        dashed = name.startswith("--")
        name = name.removeprefix("--").replace("-", "_") if dashed else name.strip()
        if dashed and not equals:
            if index < len(words) and not words[index].startswith("--") and not _is_pair(words[index]):
                text = words[index]
                index += 1
            else:
                text = "true"
        elif not equals or not name:
            raise ConfigError(
                f"cannot read {word!r}",
                where="command line",
                remedy="write key=value (no spaces around the sign), or --key value",
            )
        entries[name] = Entry(key=name, value=_scalar(text), where=f"command line: {name}", text=text)
    return list(entries.values())


def _is_pair(word: str) -> bool:
    return re.match(r"^[A-Za-z_][A-Za-z0-9_]*=", word) is not None


def _scalar(text: str) -> Any:
    """A value from the command line, read as YAML would; text that YAML cannot read is text."""
    if _WINDOWS_PATH.match(text):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
