"""The model of the disk itself, by the classic mistakes."""

from __future__ import annotations

from collections.abc import Sequence

from posix_disk import Disk, Fsync, Link, Mkdir, Open, Operation, Rename, Tree, Unlink, Write

OLD = {"a": b"old"}
WRITE_ASIDE = (Open(1, "b", creates=True, writes=True), Write(1, 0, b"new!"))
ROOT = (Open(9, "."), Fsync(9))


def left(before: Tree, *operations: Operation) -> list[Tree]:
    """The different trees after a power cut at the end."""
    disk = Disk(before)
    for operation in operations:
        disk.apply(operation)
    trees: list[Tree] = []
    for tree in disk.after_power_cut():
        if tree not in trees:
            trees.append(tree)
    return trees


def contents(trees: Sequence[Tree], path: str) -> set[bytes | None]:
    return {tree.get(path, b"(none)") for tree in trees}


def test_bytes_without_fsync_are_kept_lost_torn_or_zero() -> None:
    torn = contents(left(OLD, *WRITE_ASIDE, *ROOT), "b")
    assert torn == {b"new!", b"", b"ne", b"\0\0\0\0"}
    assert contents(left(OLD, *WRITE_ASIDE, Fsync(1), *ROOT), "b") == {b"new!"}


def test_an_fsync_of_a_file_keeps_no_name() -> None:
    assert contents(left(OLD, *WRITE_ASIDE, Fsync(1)), "b") == {b"new!", b"(none)"}


def test_replacing_a_file_needs_the_fsync_before_the_rename() -> None:
    rename = Rename("b", "a")
    assert contents(left(OLD, *WRITE_ASIDE, rename), "a") == {b"old", b"new!", b"", b"ne", b"\0\0\0\0"}
    assert contents(left(OLD, *WRITE_ASIDE, Fsync(1), rename), "a") == {b"old", b"new!"}
    assert left(OLD, *WRITE_ASIDE, Fsync(1), rename, *ROOT) == [{"a": b"new!"}]


def test_changes_of_names_come_in_any_order() -> None:
    gone = left({"d": None, "d/a": b"1", "d/b": b"2"}, Unlink("d/a"), Unlink("d/b"))
    assert sorted(sorted(tree) for tree in gone) == [["d"], ["d", "d/a"], ["d", "d/a", "d/b"], ["d", "d/b"]]


def test_a_rename_between_folders_is_atomic_and_waits_for_both() -> None:
    move = (Rename("d/a", "e/a"), Open(1, "d"), Fsync(1))
    before = {"d": None, "d/a": b"1", "e": None}
    assert left(before, *move) == [before, {"d": None, "e": None, "e/a": b"1"}]
    assert left(before, *move, Open(2, "e"), Fsync(2)) == [{"d": None, "e": None, "e/a": b"1"}]


def test_a_new_folder_is_lost_with_all_that_is_durable_in_it() -> None:
    inside = (Mkdir("d"), Open(1, "d/a", creates=True, writes=True), Fsync(1), Open(2, "d"), Fsync(2))
    assert left({}, *inside) == [{}, {"d": None, "d/a": b""}]
    assert left({}, *inside, *ROOT) == [{"d": None, "d/a": b""}]


def test_two_names_share_their_bytes() -> None:
    linked = left(OLD, Link("a", "b"), *ROOT, Open(1, "a", writes=True), Write(1, 0, b"new"), Fsync(1), Unlink("a"))
    assert linked == [{"a": b"new", "b": b"new"}, {"b": b"new"}]
