"""Edit `[[tenants]]` in a settings file and keep its comments and order.

An entry is its header, its lines and the comments directly above it. It is found by its lines, and
tomlkit edits it alone. (With the whole document, tomlkit takes the comments above an entry for the
end of the entry before, and needs ten seconds for 10,000 entries.) Entries written inline,
`tenants = [...]`, are edited in the whole document.

Invariant: the new text has the requested change and nothing else, or SettingError is raised. At
every instant the file is the old one or the new one.
"""

import contextlib
import fcntl
import os
import re
import stat
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from vllm_cost_meter.config.types import Text
from vllm_cost_meter.errors import SettingError

Entry = MutableMapping[str, Any]

_NO_VALUE = re.compile(r"\s*(#.*)?\s*")
_HEADER = re.compile(rf"\s*\[\[?[^\[\]\"'=,]+\]\]?{_NO_VALUE.pattern}")
_ENTRY = re.compile(rf"\s*\[\[\s*tenants\s*\]\]{_NO_VALUE.pattern}")
# The header of a table inside an entry.
_INNER = re.compile(r"\s*\[\[?\s*tenants\s*\..*")


def added(text: str, entry: Entry) -> str:
    """Return the text with one more tenant, after the others. Raises SettingError."""
    tenants = _tenants(text)
    lines = text.splitlines(keepends=True)
    blocks = _blocks(lines, len(tenants))
    if _is_inline(text, blocks):
        document = tomlkit.parse(text)
        document["tenants"].append(inline_table(entry))
        return _checked(text, tomlkit.dumps(document), [*tenants, entry])
    at = blocks[-1].stop if blocks else len(lines)
    before = "".join(lines[:at])
    if before and not before.endswith("\n"):
        before += "\n"
    gap = "\n" if before.strip() else ""
    new = before + gap + _written(entry) + "".join(lines[at:])
    return _checked(text, new, [*tenants, entry])


def removed(text: str, name: str) -> str:
    """Return the text without a tenant and the comments directly above it. Raises SettingError."""
    tenants = _tenants(text)
    at = _index(tenants, name)
    lines = text.splitlines(keepends=True)
    blocks = _blocks(lines, len(tenants))
    if _is_inline(text, blocks):
        document = tomlkit.parse(text)
        del document["tenants"][at]
        new = tomlkit.dumps(document)
    else:
        block = blocks[at]
        is_gap = block.stop < len(lines) and not lines[block.stop].strip()
        new = "".join([*lines[: block.start], *lines[block.stop + is_gap :]])
    return _checked(text, new, tenants[:at] + tenants[at + 1 :])


def changed(text: str, name: str, change: Callable[[Entry], None]) -> str:
    """Return the text in which `change` has edited a tenant's entry. Raises SettingError."""
    tenants = _tenants(text)
    at = _index(tenants, name)
    lines = text.splitlines(keepends=True)
    blocks = _blocks(lines, len(tenants))
    if _is_inline(text, blocks):
        document = tomlkit.parse(text)
        change(document["tenants"][at])
        new = tomlkit.dumps(document)
    else:
        block = blocks[at]
        try:
            entry = tomlkit.parse("".join(lines[block.start : block.stop]))
        except TOMLKitError:
            raise _unclear() from None
        change(entry["tenants"][0])
        new = "".join([*lines[: block.start], tomlkit.dumps(entry), *lines[block.stop :]])
    change(tenants[at])
    return _checked(text, new, tenants)


def inline_table(values: Mapping[str, Any]) -> Entry:
    """Return a TOML table that is written in one line."""
    table = tomlkit.inline_table()
    table.update(values)
    return table


def _tenants(text: str) -> list[Entry]:
    return list(tomllib.loads(text).get("tenants", ()))


def _index(tenants: Sequence[Entry], name: str) -> int:
    return [tenant["name"] for tenant in tenants].index(name)


def _blocks(lines: Sequence[str], count: int) -> list[range]:
    """Return each entry's range of lines, from the comments above it to its last value.

    The list is empty if entries are written inline. Raises SettingError if some are not found.
    """
    headers = [i for i, line in enumerate(lines) if _HEADER.fullmatch(line)]
    headers = [i for i in headers if not _INNER.match(lines[i])]
    blocks = []
    for header, end in pairwise([*headers, len(lines)]):
        if not _ENTRY.fullmatch(lines[header]):
            continue
        start, stop = header, end
        while start and lines[start - 1].lstrip().startswith("#"):
            start -= 1
        while _NO_VALUE.fullmatch(lines[stop - 1]):
            stop -= 1
        blocks.append(range(start, stop))
    if len(blocks) not in (0, count):
        raise _unclear()
    return blocks


def _is_inline(text: str, blocks: Sequence[range]) -> bool:
    return not blocks and "tenants" in tomllib.loads(text)


def _written(entry: Entry) -> str:
    table = tomlkit.table()
    table.update(entry)
    entries = tomlkit.aot()
    entries.append(table)
    document = tomlkit.document()
    document.append("tenants", entries)
    return tomlkit.dumps(document)


def _checked(before: str, after: str, wanted: Sequence[Entry]) -> str:
    """Return `after`. Raises SettingError unless only the tenants changed, as `wanted`."""
    with contextlib.suppress(tomllib.TOMLDecodeError):
        found, expected = tomllib.loads(after), tomllib.loads(before)
        found["tenants"] = found.get("tenants", [])
        expected["tenants"] = list(wanted)
        if found == expected:
            return after
    raise _unclear()


def _unclear() -> SettingError:
    expected = "entries [[tenants]] as in docs/reference/configuration.md"
    return SettingError("tenants", expected, Text("others: edit the file by hand"), "file")


# -- the file -----------------------------------------------------------------------------------


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other commands from editing files in this file's folder meanwhile. Raises OSError."""
    folder = os.open(path.resolve().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def replace_text(path: Path, text: str) -> None:
    """Replace a file's text in one step, and keep its mode and owner. Raises OSError."""
    target = path.resolve()  # A link stays a link.
    old = target.stat()
    number, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(number, "wb") as file:
            with contextlib.suppress(PermissionError):  # The editor may be in the owner's group.
                os.fchown(number, old.st_uid, old.st_gid)
            os.fchmod(number, stat.S_IMODE(old.st_mode))
            file.write(text.encode())
            file.flush()
            os.fsync(number)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink()
        raise
