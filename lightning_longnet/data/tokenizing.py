"""Text files to shards of tokens, by several processes, and on from where a run was stopped."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from hashlib import sha256
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_longnet.data.tokenizers import tokenizer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

DESCRIPTION_FILE, PLAN_FILE = "tokens.json", "unfinished.json"
PIECE_BYTES = 2**20  # of text that is handed to a tokenizer at a time


@dataclass(frozen=True)
class Piece:
    """The lines of a file that begin from byte `begin` to `end`; a document ends with its last."""

    path: str
    begin: int
    end: int
    is_last: bool


@dataclass(frozen=True)
class Plan:
    """Which text each shard holds: by the files and the settings alone, however many processes there are.

    Args:
        files: path, bytes and time of change of each, in their order.
        tokenizer: by its name.
        shard_bytes: of text in a shard, at least, but for the last one.
    """

    files: tuple[tuple[str, int, int], ...]
    tokenizer: str
    shard_bytes: int

    @property
    def bytes(self) -> int:
        return sum(size for _, size, _ in self.files)

    def digest(self) -> str:
        return sha256(json.dumps(asdict(self)).encode()).hexdigest()

    def shards(self) -> Iterator[list[Piece]]:
        shard: list[Piece] = []
        held = 0
        for path, size, _ in self.files:
            for begin in range(0, size, PIECE_BYTES):
                end = min(begin + PIECE_BYTES, size)
                shard.append(Piece(path, begin, end, end == size))
                held += end - begin
                if held >= self.shard_bytes:
                    yield shard
                    shard, held = [], 0
        if shard:
            yield shard


def plan_of(files: Sequence[Path], tokenizer: str, shard_bytes: int) -> Plan:
    told = [(path, path.stat()) for path in files]
    found = tuple((str(path.resolve()), each.st_size, each.st_mtime_ns) for path, each in told)
    return Plan(found, tokenizer, shard_bytes)


def tokenize(plan: Plan, folder: Path, workers: int, advance: Callable[[int], Any]) -> dict[str, Any]:
    """Write the shards that are not there yet, and then what they are; that is handed back, too.

    A shard appears when it is whole.  A folder of another plan is refused.

    Args:
        plan: what to write.
        folder: where to.
        workers: processes; 1 works in this one.
        advance: told of each shard how many bytes of text it holds, also of those that were there.
    """
    tokenizer = tokenizer_of(plan.tokenizer)  # what is wrong with it is said before anything is written
    told = {"tokenizer": plan.tokenizer, "vocab_size": tokenizer.vocab_size, "end": tokenizer.end}
    _claim(folder, plan)
    shards = list(plan.shards())
    sizes = [sum(piece.end - piece.begin for piece in shard) for shard in shards]
    missing = [number for number in range(len(shards)) if not shard_file(folder, number).exists()]
    for number in set(range(len(shards))) - set(missing):
        advance(sizes[number])
    dtype = _dtype_of(tokenizer.vocab_size)
    tasks = {number: (str(folder), number, shards[number], plan.tokenizer, dtype) for number in missing}
    for number in _done(tasks, workers):
        advance(sizes[number])
    tokens = [len(np.load(shard_file(folder, number), mmap_mode="r")) for number in range(len(shards))]
    description = {
        **told,
        "dtype": dtype,
        "tokens": sum(tokens),
        "bytes": plan.bytes,
        "bytes_per_token": plan.bytes / sum(tokens),
        "documents": len([size for _, size, _ in plan.files if size]),
        "shards": [shard_file(folder, number).name for number in range(len(shards))],
        "plan": plan.digest(),
    }
    _write(folder / DESCRIPTION_FILE, json.dumps(description, indent=1).encode())
    (folder / PLAN_FILE).unlink(missing_ok=True)
    return description


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"tokens-{number:05}.npy"


def document_file(shard: Path) -> Path:
    """Where documents begin in a shard."""
    return shard.with_name(shard.name.replace("tokens", "documents"))


def _claim(folder: Path, plan: Plan) -> None:
    """A folder holds one plan, whose shards a run that was stopped may have left."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (DESCRIPTION_FILE, PLAN_FILE):
        path = folder / name
        if path.exists() and read_description(path).get("plan") != plan.digest():
            raise ValueError(
                f"out must be a folder of its own: {folder} holds tokens of other files, or of other settings; give "
                f"another, or remove it"
            )
    _write(folder / PLAN_FILE, json.dumps({"plan": plan.digest()}).encode())


def read_description(path: Path) -> dict[str, Any]:
    """Of tokens; what is no JSON is told with its path."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must be as longnet tokenize leaves it, got what is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be as longnet tokenize leaves it, got a {type(found).__name__}")
    return found


def _done(tasks: dict[int, tuple[Any, ...]], workers: int) -> Iterator[int]:
    """Numbers of shards, as they are written."""
    if workers == 1:
        for number, task in tasks.items():
            write_shard(*task)
            yield number
        return
    pool = ProcessPoolExecutor(min(workers, len(tasks) or 1), get_context("spawn"), _end_with_parent)
    with pool:
        numbers = {pool.submit(write_shard, *task): number for number, task in tasks.items()}
        for future in as_completed(numbers):
            if error := future.exception():
                pool.shutdown(cancel_futures=True)
                if isinstance(error, ValueError):
                    raise ValueError(str(error)) from error  # from here: not from where the pool hands it on
                raise error
            yield numbers[future]


def write_shard(folder: str, number: int, pieces: Sequence[Piece], tokenizer: str, dtype: str) -> None:
    """The tokens of its text, and where documents begin in them."""
    tool = tokenizer_of(tokenizer)
    parts, documents, count = [], [], 0
    for piece in pieces:
        if piece.begin == 0:
            documents.append(count)
        ids = tool.encode(_text_of(piece))
        if piece.is_last:
            ids.append(tool.end)
        parts.append(np.array(ids, dtype=dtype))
        count += len(ids)
    path = shard_file(Path(folder), number)
    _write(document_file(path), np.array(documents, dtype=np.int64))
    _write(path, np.concatenate(parts))


def _text_of(piece: Piece) -> str:
    raw = lines_of(Path(piece.path), piece.begin, piece.end)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"paths must hold text in UTF-8, {piece.path} does not: {error.reason} in the lines from byte {piece.begin}"
        ) from error


def lines_of(path: Path, begin: int, end: int) -> bytes:
    """Those that begin from byte `begin` to `end`, whole: pieces of a file are its lines, each once."""
    with path.open("rb") as opened:
        if begin > 0:
            opened.seek(begin - 1)
            opened.readline()  # of a line that began before
        first = opened.tell()
        if first >= end:
            return b""
        text = opened.read(end - first)
        return text if text.endswith(b"\n") else text + opened.readline()


def _write(path: Path, content: bytes | np.ndarray[Any, Any]) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as opened:
        if isinstance(content, bytes):
            opened.write(content)
        else:
            np.save(opened, content)
    os.replace(part, path)


def _dtype_of(vocab_size: int) -> str:
    return next(name for name in ("uint8", "uint16", "uint32") if vocab_size - 1 <= np.iinfo(name).max)


def _end_with_parent() -> None:
    """A worker of a process that was killed would wait for work without end."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()
