"""Files with one JSON object per line, plain or packed, with errors that name file and line."""

import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from lm.data.files import check_no_nul, decode, lines
from lm.data.sources import CorpusError

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_jsonl(
    path: str | os.PathLike[str], *fields: str
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(line number from 1, place for messages, object) of each line that is not blank.

    Args:
      path: plain, or packed where its name ends in `.gz` or `.zst`.
      fields: that the objects are read for.

    Raises:
      CorpusError: the file cannot be read or is damaged, a line is not an object in UTF-8, a key
        has two values, or text in `fields` is not Unicode.
    """
    for number, line in enumerate(lines(path), 1):
        if line.strip():
            where = f"'{path}', line {number}"
            check_no_nul(line, path, number)
            value = _parse(decode(line, path, number).rstrip("\r\n"), fields, where)
            if _SURROGATE.search(line):
                for field in fields:
                    _check_text(value.get(field), field, where)
            yield number, where, value


def _parse(line: str, fields: tuple[str, ...], where: str) -> dict[str, Any]:
    try:
        value = json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where}: not JSON: {error.msg} (character {error.pos + 1})") from error
    except RecursionError as error:
        raise CorpusError(f"{where}: nested too deeply") from error
    except KeyError as error:
        raise CorpusError(f"{where}: the key {error} has two values; keep one") from error
    except ValueError as error:
        most = sys.get_int_max_str_digits()
        raise CorpusError(
            f"{where}: a number of more than {most} digits; write it as a string"
        ) from error
    if not isinstance(value, dict):
        names = " or ".join(f"'{field}'" for field in fields)
        raise CorpusError(f"{where}: a JSON {type(value).__name__}, not an object with {names}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises KeyError for a key of two values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise KeyError(key)
    return found


def _check_text(value: Any, field: str, where: str) -> None:
    """Raises CorpusError for half a surrogate pair, which JSON can write and UTF-8 cannot."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise CorpusError(
                f"{where}: field '{field}' has half a surrogate pair at character "
                f"{error.start + 1}, which is not Unicode text"
            ) from error
    elif isinstance(value, list | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in items:
            _check_text(key, field, where)
            _check_text(each, f"{field}.{key}", where)
