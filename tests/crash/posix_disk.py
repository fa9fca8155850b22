"""What a disk may hold after a power cut: a small model of a POSIX file system. Pure: nothing here touches a disk.

A :class:`Disk` is told the operations of a program in their order, and names the trees that a power cut at that point
may leave (``after_power_cut``). It promises as little as POSIX, ext4, xfs and NFS do together:

1. ``fsync`` of a file makes its bytes and its length durable, but not its name.
2. ``fsync`` of a folder makes the changes of its names so far durable, but no byte of the files that they name, and
   not the folder's own name in its parent.
3. Bytes that were not fsynced may be kept or lost, or torn: half of them, or zeros where they should be (a length that
   reached the disk before its bytes). Files do so independently of each other.
4. Changes of names that were not fsynced may be kept or lost, in any order, each independently of the others, also of
   those that came before it in the same folder.
5. One change of names is atomic: a rename is never seen half done, also between two folders (file systems log it as
   one transaction). It is durable once every folder that it changes was fsynced.
6. What was durable stays so: a disk that lies about fsync, or loses what it has confirmed, is not modelled.

Real file systems are kinder in 4: a journal keeps the order of changes. Programs that rely on it are what this model
is to find. While few changes wait, all their subsets are tried; of more than ``_EXHAUSTIVE`` waiting ones: none, all,
each one dropped, each one alone, and every prefix.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath

Tree = Mapping[str, bytes | None]
"""Path -> the file's bytes, or None for a folder. Paths are relative to the root, which is not listed."""

_EXHAUSTIVE = 4
_ROOT = 0


@dataclasses.dataclass(frozen=True)
class Open:
    """A file or folder is opened; ``handle`` names it from now on, whatever becomes of its path."""

    handle: int
    path: str
    creates: bool = False
    writes: bool = False


@dataclasses.dataclass(frozen=True)
class Write:
    """Bytes at an offset."""

    handle: int
    offset: int
    data: bytes


@dataclasses.dataclass(frozen=True)
class Truncate:
    """The length is set; what is new is zeros."""

    handle: int
    length: int


@dataclasses.dataclass(frozen=True)
class Fsync:
    """Of a file, or of a folder."""

    handle: int


@dataclasses.dataclass(frozen=True)
class Close:
    """Changes nothing on a local disk; network file systems show a file's bytes to others from here on."""

    handle: int


@dataclasses.dataclass(frozen=True)
class Mkdir:
    """A new, empty folder."""

    path: str


@dataclasses.dataclass(frozen=True)
class Rename:
    """``os.rename`` and ``os.replace``."""

    source: str
    target: str


@dataclasses.dataclass(frozen=True)
class Link:
    """A second name of a file."""

    source: str
    target: str


@dataclasses.dataclass(frozen=True)
class Unlink:
    """A file's name goes; its bytes go with the last name."""

    path: str


@dataclasses.dataclass(frozen=True)
class Rmdir:
    """An empty folder goes."""

    path: str


@dataclasses.dataclass(frozen=True)
class Told:
    """No operation: the program said something that it must keep from here on."""

    event: str
    step: int | None


Operation = Open | Write | Truncate | Fsync | Close | Mkdir | Rename | Link | Unlink | Rmdir | Told
_Entry = tuple[int, str]
"""A name in a folder."""


@dataclasses.dataclass
class _File:
    """Bytes as programs see them, and as a power cut certainly leaves them."""

    live: bytes = b""
    durable: bytes = b""

    def after_power_cut(self) -> list[bytes]:
        """Kept, lost, half written, and zeros in the place of what is new."""
        if self.live == self.durable:
            return [self.live]
        half = len(self.live) // 2
        torn = self.live[:half] + self.durable[half:]
        padded = self.durable.ljust(len(self.live), b"\0")
        zeroed = bytes(new if new == old else 0 for new, old in zip(self.live, padded, strict=False))
        return list(dict.fromkeys((self.live, self.durable, torn, zeroed)))


@dataclasses.dataclass
class _Change:
    """One atomic change of names, and the folders whose fsync it waits for."""

    names: dict[_Entry, int | None]
    waits_for: set[int]


class Disk:
    """See above.

    Args:
        tree: what is on the disk already, durably.
    """

    def __init__(self, tree: Tree) -> None:
        self._numbers = itertools.count(_ROOT + 1)
        self._files: dict[int, _File] = {}
        self._handles: dict[int, int] = {}
        self._live: dict[_Entry, int] = {}
        self._durable: dict[_Entry, int] = {}
        self._changes: list[_Change] = []
        """In order, from the first one that is not durable."""
        for path in sorted(tree):
            content = tree[path]
            node = next(self._numbers)
            if content is not None:
                self._files[node] = _File(content, content)
            self._live[self._entry(path)] = node
        self._durable = dict(self._live)

    def apply(self, operation: Operation) -> bool:
        """Take the next operation; whether it can have changed what a power cut leaves."""
        match operation:
            case Open(handle, path, creates):
                if creates:
                    self._files[node := next(self._numbers)] = _File()
                    self._change({self._entry(path): node})
                self._handles[handle] = self._node(path)
                return creates
            case Write(handle, offset, data):
                file = self._files[self._handles[handle]]
                file.live = file.live[:offset].ljust(offset, b"\0") + data + file.live[offset + len(data) :]
            case Truncate(handle, length):
                file = self._files[self._handles[handle]]
                file.live = file.live[:length].ljust(length, b"\0")
            case Fsync(handle):
                self._fsync(self._handles[handle])
            case Mkdir(path):
                self._change({self._entry(path): next(self._numbers)})
            case Rename(source, target):
                moved = self._node(source)
                self._change({self._entry(source): None, self._entry(target): moved})
            case Link(source, target):
                self._change({self._entry(target): self._node(source)})
            case Unlink(path) | Rmdir(path):
                self._change({self._entry(path): None})
            case Close() | Told():
                return False
        return True

    def as_seen(self) -> Tree:
        """The tree as programs see it while the power is on."""
        return self._tree(self._live, {node: file.live for node, file in self._files.items()})

    def after_power_cut(self) -> Iterator[Tree]:
        """The trees that a power cut may leave at this point; one may come several times."""
        bytes_left = list(self._bytes_left())
        for kept in _subsets(len(self._changes)):
            names = dict(self._durable)
            for number, change in enumerate(self._changes):
                if number in kept or not change.waits_for:
                    _set(names, change)
            for contents in bytes_left:
                yield self._tree(names, contents)

    def _bytes_left(self) -> Iterator[dict[int, bytes]]:
        """All files in the same way, then each one alone in each way while the others are kept."""
        ways = {node: file.after_power_cut() for node, file in self._files.items()}
        uncertain = {node: each for node, each in ways.items() if len(each) > 1}
        whole = {node: each[0] for node, each in ways.items()}
        for way in range(max(map(len, uncertain.values()), default=1)):
            yield whole | {node: each[min(way, len(each) - 1)] for node, each in uncertain.items()}
        if len(uncertain) > 1:
            for node, each in uncertain.items():
                yield from (whole | {node: content} for content in each[1:])

    def _fsync(self, node: int) -> None:
        if node in self._files:
            self._files[node].durable = self._files[node].live
            return
        for change in self._changes:
            change.waits_for.discard(node)
        while self._changes and not self._changes[0].waits_for:
            _set(self._durable, self._changes.pop(0))

    def _change(self, names: dict[_Entry, int | None]) -> None:
        change = _Change(names, {folder for folder, _ in names})
        _set(self._live, change)
        self._changes.append(change)

    def _entry(self, path: str) -> _Entry:
        pure = PurePosixPath(path)
        return self._node(str(pure.parent)), pure.name

    def _node(self, path: str) -> int:
        node = _ROOT
        for name in PurePosixPath(path).parts:
            node = self._live[node, name]
        return node

    def _tree(self, names: Mapping[_Entry, int], contents: Mapping[int, bytes]) -> Tree:
        inside: dict[int, list[tuple[str, int]]] = {}
        for (folder, name), node in names.items():
            inside.setdefault(folder, []).append((name, node))
        tree: dict[str, bytes | None] = {}
        folders = [("", _ROOT)]
        while folders:
            path, folder = folders.pop()
            for name, node in inside.get(folder, ()):
                tree[path + name] = contents.get(node)
                if node not in contents:
                    folders.append((f"{path}{name}/", node))
        return tree


def _set(names: dict[_Entry, int], change: _Change) -> None:
    for entry, node in change.names.items():
        if node is None:
            names.pop(entry, None)
        else:
            names[entry] = node


def _subsets(count: int) -> Iterable[frozenset[int]]:
    every = range(count)
    if count <= _EXHAUSTIVE:
        chosen = itertools.chain.from_iterable(itertools.combinations(every, size) for size in range(count + 1))
        return map(frozenset, chosen)
    alone = ({number} for number in every)
    dropped = ({*every} - {number} for number in every)
    prefixes = (set(range(size)) for size in range(count + 1))
    return dict.fromkeys(map(frozenset, itertools.chain(prefixes, alone, dropped)))
