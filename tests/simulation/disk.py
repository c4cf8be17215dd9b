"""A disk in memory, with a page cache that a crash of the machine may lose in part.

It stands where `vllm_cost_meter.journal.files` stands. Every call is a point at which another
process may run, this one may be killed, or an error may come. What a process wrote survives its
death; what the disk was not asked to keep survives a crash by chance:

- of a file, each sector as it was after some of the writes to it, so writes are dropped, torn and
  reordered; what a failed sync covered stays uncertain for ever, though the next sync says all is
  well;
- of a folder, the names as they were after some of the changes, in order.

Invariant: what was synced without an error is there after every crash.
"""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

SECTOR_BYTES = 512
FULL, BROKEN = errno.ENOSPC, errno.EIO


class Killed(BaseException):
    """Ends a process at the call where it was killed."""


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@dataclass(slots=True, eq=False)
class File:
    """A file as processes see it, as the disk has it, and the writes that are between."""

    data: bytearray = field(default_factory=bytearray)
    synced: bytearray = field(default_factory=bytearray)
    # The bytes at an offset; None for the end of the file.
    writes: list[tuple[int, bytes | None]] = field(default_factory=list)
    # What a failed sync covered.
    doubtful: list[tuple[int, bytes | None]] = field(default_factory=list)
    locked_by: int | None = None

    def write(self, offset: int, data: bytes) -> None:
        self._put(self.data, offset, data)
        self.writes.append((offset, data))

    def truncate(self, size: int) -> None:
        self._put(self.data, size, None)
        self.writes.append((size, None))

    @staticmethod
    def _put(image: bytearray, offset: int, data: bytes | None) -> None:
        if data is None:
            del image[offset:]
            return
        if len(image) < offset:
            image.extend(bytes(offset - len(image)))
        image[offset : offset + len(data)] = data

    def sync(self) -> None:
        for offset, data in self.writes:
            self._put(self.synced, offset, data)
        if len(self.synced) < len(self.data):
            self.synced.extend(bytes(len(self.data) - len(self.synced)))
        self.writes.clear()

    def fail_to_sync(self) -> None:
        self.doubtful += self.writes
        self.writes.clear()

    def crash(self, random: Random) -> None:
        image = bytearray(self.synced)
        if len(self.data) > len(image) and random.random() < 0.7:
            image.extend(bytes(len(self.data) - len(image)))
        pending = self.doubtful + self.writes
        if pending:
            kind = random.random()
            lasting: dict[int, int] = {}
            for at, (offset, data) in enumerate(pending):
                if data is None:
                    if random.random() < 0.5:
                        self._put(image, offset, None)
                    continue
                end = offset + len(data)
                while offset < end:
                    sector = offset // SECTOR_BYTES
                    until = min((sector + 1) * SECTOR_BYTES, end)
                    if sector not in lasting:
                        lasting[sector] = (
                            random.randint(0, len(pending)) if kind < 0.6 else len(pending)
                        )
                    if at < lasting[sector]:
                        self._put(image, offset, data[len(data) - end + offset :][: until - offset])
                    offset = until
        self.data, self.synced = image, bytearray(image)
        self.writes, self.doubtful, self.locked_by = [], [], None


@dataclass(slots=True, eq=False)
class Folder:
    """A folder as processes see it, as the disk has it, and the changes that are between."""

    names: dict[str, "File | Folder"] = field(default_factory=dict)
    synced: dict[str, "File | Folder"] = field(default_factory=dict)
    changes: list[dict[str, "File | Folder | None"]] = field(default_factory=list)

    def change(self, **names: "File | Folder | None") -> None:
        self._make(self.names, names)
        self.changes.append(names)

    @staticmethod
    def _make(image: dict[str, "File | Folder"], names: dict[str, "File | Folder | None"]) -> None:
        for name, node in names.items():
            if node is None:
                image.pop(name, None)
            else:
                image[name] = node

    def sync(self) -> None:
        self.synced = dict(self.names)
        self.changes.clear()

    def crash(self, random: Random) -> None:
        for names in self.changes[: random.randint(0, len(self.changes))]:
            self._make(self.synced, names)
        self.sync_back()
        for node in self.names.values():
            node.crash(random)

    def sync_back(self) -> None:
        self.names = dict(self.synced)
        self.changes.clear()


@dataclass(slots=True)
class Call:
    """A call that a process is about to make: what a kill in its middle leaves."""

    name: str
    partly: Callable[[], None] | None = None


class Disk:
    """The functions of `vllm_cost_meter.journal.files`, over folders in memory.

    `before` is called with each call before it is made, and may raise.
    """

    FUNCTIONS = (
        *("close", "pread", "pwrite", "allocate", "sync_data", "open_file", "size_bytes"),
        *("is_file", "try_to_lock", "exists", "names", "make_folder", "rename", "remove_file"),
        *("remove_folder", "sync_folder"),
    )

    def __init__(self, random: Random, before: Callable[[Call], None]) -> None:
        self.root = Folder()
        self.is_full = False
        self.open: dict[int, File] = {}
        self._random = random
        self._before = before
        self._next_descriptor = 3

    # ---- what happens to it

    def crash(self) -> None:
        """Lose what was not synced, by chance, and all that was open."""
        self.open.clear()
        self.root.crash(self._random)

    def close_all(self, descriptors: set[int]) -> None:
        """Close what a process had open, as the kernel does at its end."""
        for descriptor in descriptors:
            self._closed(descriptor)

    def _closed(self, descriptor: int) -> None:
        file = self.open.pop(descriptor, None)
        if file is not None and file.locked_by == descriptor:
            file.locked_by = None

    def files(self) -> list[tuple[str, File]]:
        """Return all files with their paths."""
        found, folders = [], [("", self.root)]
        while folders:
            above, folder = folders.pop()
            for name, node in folder.names.items():
                if isinstance(node, Folder):
                    folders.append((f"{above}/{name}", node))
                else:
                    found.append((f"{above}/{name}", node))
        return sorted(found, key=lambda each: each[0])

    # ---- the functions

    def _find(self, path: Path | str) -> Any:
        node: Any = self.root
        for name in str(path).split("/")[1:]:
            if name:
                node = node.names.get(name) if isinstance(node, Folder) else None
        return node

    def _above(self, path: Path) -> tuple[Folder, str]:
        """Return the folder of a path, and the name in it."""
        above, _, name = str(path).rpartition("/")
        return self._folder(above), name

    def _folder(self, path: Path | str) -> Folder:
        found = self._find(path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "no such folder", str(path))
        if not isinstance(found, Folder):
            raise NotADirectoryError(errno.ENOTDIR, "no folder", str(path))
        return found

    def _need_space(self) -> None:
        if self.is_full:
            raise error(FULL)

    def open_file(self, path: Path, flags: int) -> int:
        self._before(Call("open"))
        folder, short = self._above(path)
        node = folder.names.get(short)
        if node is None:
            if not flags & os.O_CREAT:
                raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
            self._need_space()
            node = File()
            folder.change(**{short: node})
        assert isinstance(node, File)
        if flags & os.O_TRUNC and node.data:
            node.data, node.synced, node.writes = bytearray(), bytearray(), []
        self._next_descriptor += 1
        self.open[self._next_descriptor] = node
        return self._next_descriptor

    def close(self, descriptor: int) -> None:
        self._before(Call("close"))
        if descriptor not in self.open:
            raise error(errno.EBADF)
        self._closed(descriptor)

    def pread(self, descriptor: int, length: int, offset: int) -> bytes:
        self._before(Call("read"))
        return bytes(self.open[descriptor].data[offset : offset + length])

    def pwrite(self, descriptor: int, data: bytes, offset: int) -> int:
        file, data = self.open[descriptor], bytes(data)

        def partly() -> None:
            if part := self._random.randrange(len(data)):
                file.write(offset, data[:part])

        try:
            self._before(Call("write", partly))
        except OSError:
            if self._random.random() < 0.5:
                partly()
            raise
        if offset + len(data) > len(file.data):
            self._need_space()
        if len(data) > 1 and self._random.random() < 0.05:
            data = data[: self._random.randrange(1, len(data))]
        file.write(offset, data)
        return len(data)

    def allocate(self, descriptor: int, offset: int, length: int) -> None:
        self._before(Call("allocate"))
        self._need_space()
        file = self.open[descriptor]
        file.data.extend(bytes(max(offset + length - len(file.data), 0)))

    def sync_data(self, descriptor: int) -> None:
        file = self.open[descriptor]
        try:
            self._before(Call("sync"))
        except OSError:
            file.fail_to_sync()
            raise
        file.sync()

    def size_bytes(self, descriptor: int) -> int:
        return len(self.open[descriptor].data)

    def is_file(self, descriptor: int) -> bool:
        return descriptor in self.open

    def try_to_lock(self, descriptor: int) -> bool:
        self._before(Call("lock"))
        file = self.open[descriptor]
        if file.locked_by is not None:
            return False
        file.locked_by = descriptor
        return True

    def exists(self, path: Path) -> bool:
        return self._find(path) is not None

    def names(self, folder: Path) -> list[str]:
        self._before(Call("list"))
        return list(self._folder(folder).names)

    def make_folder(self, folder: Path) -> bool:
        self._before(Call("make folder"))
        above = self._folder(folder.parent)
        if folder.name in above.names:
            return False
        self._need_space()
        above.change(**{folder.name: Folder()})
        return True

    def rename(self, path: Path, to: Path) -> None:
        self._before(Call("rename"))
        folder = self._folder(path.parent)
        assert path.parent == to.parent, "a rename between folders is not simulated"
        if path.name not in folder.names:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        folder.change(**{path.name: None, to.name: folder.names[path.name]})

    def remove_file(self, path: Path) -> None:
        self._before(Call("remove"))
        folder = self._folder(path.parent)
        if path.name in folder.names:
            folder.change(**{path.name: None})

    def remove_folder(self, folder: Path) -> None:
        self._before(Call("remove folder"))
        if self._folder(folder).names:
            raise error(errno.ENOTEMPTY)
        self._folder(folder.parent).change(**{folder.name: None})

    def sync_folder(self, folder: Path) -> None:
        self._before(Call("sync folder"))
        self._folder(folder).sync()
