"""Pairs of texts: what the wire reads and what the models must then say."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from latentwire.errors import WorkloadError
from latentwire.workloads.pair.options import DataOptions

SQUAD_LAYOUT = (
    '{"data": [{"paragraphs": [{"context": "...", "qas": [{"question": "...", "answers": [{"text": "..."}]}]}]}]}'
)
PASSAGE_BYTES = 128


class Pair(NamedTuple):
    """One sample: the bytes that the encoder reads, the text that both models predict. Neither is empty."""

    source: bytes
    target: str


@dataclasses.dataclass(frozen=True)
class PairData:
    """All samples, and the SHA-256 over all of their text in order."""

    train: list[Pair]
    eval: list[Pair]
    digest: str


def load_pairs(options: DataOptions) -> PairData:
    """Read all pairs into memory and split them; the same options and files give the same lists.

    Raises:
        WorkloadError: a file is missing or malformed, a library is missing, or nothing is left to train on.
    """
    pairs = list(_read(options, options.path, options.split))
    if options.eval_path or options.eval_split:
        train, held_out = pairs, list(_read(options, options.eval_path, options.eval_split or options.split))
        held_out = _hold_out(held_out, options.eval_size)[1]
    else:
        train, held_out = _hold_out(pairs, options.eval_size)
    train = train[: options.train_size]
    if not train:
        raise WorkloadError(
            f"data: {_origin(options)} has {len(pairs)} pairs and eval_size is {options.eval_size}: nothing is left to "
            "train on; lower eval_size or give more data"
        )
    return PairData(train, held_out, _digest([*train, *held_out]))


def pydoc_passages() -> list[tuple[str, str]]:
    """The prose of CPython's own help topics, as (topic, passage): whole words, up to ``PASSAGE_BYTES``, no overlap.

    The text differs between versions of Python, which is why ``PairData`` carries a digest.
    """
    from pydoc_data.topics import topics

    return [
        (topic, passage)
        for topic in sorted(topics)
        for paragraph in re.split(r"\n\s*\n", topics[topic])
        if _is_prose(paragraph)
        for passage in _cut(paragraph)
    ]


def _is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return paragraph.strip()[:1].isalpha() and letters > 0.85 * len(paragraph)


def _cut(paragraph: str) -> Iterator[str]:
    passage = ""
    for word in paragraph.split():
        if passage and len(f"{passage} {word}".encode()) > PASSAGE_BYTES:
            yield passage
            passage = ""
        passage = f"{passage} {word}".strip()
    if passage:
        yield passage


def _read(options: DataOptions, path: str | None, split: str) -> Iterator[Pair]:
    limit = options.max_source_bytes
    if options.kind == "pydoc":
        # what the passage is about: a wire learns that within minutes, and has to read the passage for it
        return (Pair(passage.encode()[:limit], topic) for topic, passage in pydoc_passages())
    if options.kind == "datasets":
        return _dataset_pairs(options.name or "", split, limit)
    file = Path(path or "").expanduser()
    return (_squad_pairs if options.kind == "squad" else _jsonl_pairs)(file, limit)


def _squad_pairs(path: Path, limit: int) -> Iterator[Pair]:
    try:
        tree = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise WorkloadError(f"{path}, line {error.lineno}: not JSON ({error.msg}); SQuAD is {SQUAD_LAYOUT}") from None
    for a, article in enumerate(_get(tree, "data", list, path, "the file")):
        for p, paragraph in enumerate(_get(article, "paragraphs", list, path, f"data[{a}]")):
            where = f"data[{a}].paragraphs[{p}]"
            context = _get(paragraph, "context", str, path, where)
            for q, qa in enumerate(_get(paragraph, "qas", list, path, where)):
                inner = f"{where}.qas[{q}]"
                question = _get(qa, "question", str, path, inner)
                answers = _get(qa, "answers", list, path, inner)
                if answers:  # SQuAD 2.0 also asks what the context cannot answer
                    answer = _get(answers[0], "text", str, path, f"{inner}.answers[0]")
                    yield _squad_pair(context, question, answer, limit)


def _squad_pair(context: str, question: str, answer: str, limit: int) -> Pair:
    asked = question.encode()[: limit // 2]
    return Pair((context.encode()[: limit - len(asked) - 1] + b"\n" + asked)[:limit], answer)


def _get(node: Any, key: str, kind: type, path: Path, where: str) -> Any:
    value = node.get(key) if isinstance(node, Mapping) else None
    if not isinstance(value, kind) or (kind is str and not value):
        wanted = "a list" if kind is list else "a text that is not empty"
        raise WorkloadError(f"{path}: {where} must have {key!r}, {wanted}; SQuAD is {SQUAD_LAYOUT}")
    return value


def _jsonl_pairs(path: Path, limit: int) -> Iterator[Pair]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise WorkloadError(f"{path}, line {number}: not JSON ({error.msg}); mend or remove the line") from None
        yield _row_pair(row, f"{path}, line {number}", limit)


def _row_pair(row: Any, where: str, limit: int) -> Pair:
    source, target = (row.get(key) if isinstance(row, Mapping) else None for key in ("source", "target"))
    if not (isinstance(source, str) and source and isinstance(target, str) and target):
        raise WorkloadError(f'{where}: must be {{"source": "...", "target": "..."}}, both texts and neither empty')
    return Pair(source.encode()[:limit], target)


def _dataset_pairs(name: str, split: str, limit: int) -> Iterator[Pair]:
    try:
        import datasets
    except ImportError:
        raise WorkloadError(
            f"data.kind is datasets ({name}), and that library is not installed: pip install datasets, or save the "
            "data as a file and set kind: squad or jsonl with its path"
        ) from None
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise WorkloadError(
            f"data: {name!r} (split {split!r}) cannot be loaded: {error}; check both names, and on a machine without "
            "internet fetch it beforehand"
        ) from error
    for index, row in enumerate(rows):
        if not {"context", "question", "answers"} <= set(row):
            yield _row_pair(row, f"{name} {split}[{index}]", limit)
        elif row["answers"]["text"]:
            yield _squad_pair(row["context"], row["question"], row["answers"]["text"][0], limit)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise WorkloadError(f"data: there is no file {path.absolute()}; set workload.options.data.path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"data: {path} cannot be read as UTF-8 text: {error}") from error


def _hold_out(pairs: list[Pair], size: int) -> tuple[list[Pair], list[Pair]]:
    """Split by the hash of the source: equal sources stay together, wherever they stand in the file."""
    order = sorted(range(len(pairs)), key=lambda i: (hashlib.sha256(pairs[i].source).digest(), i))
    chosen = set(order[:size])
    return [p for i, p in enumerate(pairs) if i not in chosen], [p for i, p in enumerate(pairs) if i in chosen]


def _digest(pairs: Iterable[Pair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        target = pair.target.encode()
        digest.update(b"%d:%s%d:%s" % (len(pair.source), pair.source, len(target), target))
    return digest.hexdigest()


def _origin(options: DataOptions) -> str:
    return options.path or options.name or "Python's help text"
