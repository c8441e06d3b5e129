"""Tokenisation of text files to shards of tokens, by several processes, which continues after an interruption."""

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

from lightning_longnet.data.tokenizers import lasting_name, tokenizer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

DESCRIPTION_FILE, PLAN_FILE = "tokens.json", "unfinished.json"
PIECE_BYTES = 2**20  # bytes of text in one call of a tokenizer


@dataclass(frozen=True)
class Piece:
    """The lines of a file that begin at bytes `begin` to `end`; `is_last` marks the end of the document."""

    path: str
    begin: int
    end: int
    is_last: bool


@dataclass(frozen=True)
class Plan:
    """The assignment of text to shards.  It depends on the files and options, and not on the number of processes.

    Args:
        files: path, size in bytes and modification time in ns of each file, in their order.
        tokenizer: the name of the tokenizer.
        shard_bytes: minimal number of bytes of text in each shard but the last.
    """

    files: tuple[tuple[str, int, int], ...]
    tokenizer: str
    shard_bytes: int

    @property
    def bytes(self) -> int:
        """The bytes of text in all files."""
        return sum(size for _, size, _ in self.files)

    def digest(self) -> str:
        """Return a hash of all fields."""
        return sha256(json.dumps(asdict(self)).encode()).hexdigest()

    def shards(self) -> Iterator[list[Piece]]:
        """Yield the pieces of each shard."""
        shard: list[Piece] = []
        shard_size = 0
        for path, size, _ in self.files:
            for begin in range(0, size, PIECE_BYTES):
                end = min(begin + PIECE_BYTES, size)
                shard.append(Piece(path, begin, end, end == size))
                shard_size += end - begin
                if shard_size >= self.shard_bytes:
                    yield shard
                    shard, shard_size = [], 0
        if shard:
            yield shard


def plan_of(files: Sequence[Path], tokenizer: str, shard_bytes: int) -> Plan:
    """Return the plan of these files in their present state."""
    stats = [(path, path.stat()) for path in files]
    described = tuple((str(path.resolve()), each.st_size, each.st_mtime_ns) for path, each in stats)
    return Plan(described, lasting_name(tokenizer), shard_bytes)


def tokenize(plan: Plan, folder: Path, workers: int, advance: Callable[[int], Any]) -> dict[str, Any]:
    """Write the shards of a plan that do not exist yet, then tokens.json, and return the content of that.

    Shards are written atomically.  A folder with another plan is refused.

    Args:
        plan: the plan.
        folder: the folder to write to.
        workers: number of processes; 1 works in this process.
        advance: called with the bytes of text of each shard that is finished or existed already.
    """
    tokenizer = tokenizer_of(plan.tokenizer)  # raises on a wrong name before anything is written
    header = {"tokenizer": plan.tokenizer, "vocab_size": tokenizer.vocab_size, "end": tokenizer.end}
    _claim(folder, plan)
    shards = list(plan.shards())
    sizes = [sum(piece.end - piece.begin for piece in shard) for shard in shards]
    missing = [number for number in range(len(shards)) if not shard_file(folder, number).exists()]
    for number in set(range(len(shards))) - set(missing):
        advance(sizes[number])
    dtype = _dtype_of(tokenizer.vocab_size)
    tasks = {number: (str(folder), number, shards[number], plan.tokenizer, dtype) for number in missing}
    for number in _write_shards(tasks, workers):
        advance(sizes[number])
    tokens = [len(np.load(shard_file(folder, number), mmap_mode="r")) for number in range(len(shards))]
    description = {
        **header,
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
    """Return the path of a shard."""
    return folder / f"tokens-{number:05}.npy"


def document_file(shard: Path) -> Path:
    """Return the path of the file with the indices at which documents begin in a shard."""
    return shard.with_name(shard.name.replace("tokens", "documents"))


def _claim(folder: Path, plan: Plan) -> None:
    """Create the folder and record the plan in it; refuse a folder that has another plan."""
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
    """Return the content of a description of tokens; raise a ValueError with the path if it is not JSON."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must be as longnet tokenize leaves it, got what is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be as longnet tokenize leaves it, got a {type(content).__name__}")
    return content


def _write_shards(tasks: dict[int, tuple[Any, ...]], workers: int) -> Iterator[int]:
    """Run `write_shard` for all tasks, and yield the number of each shard when it is written."""
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
                    raise ValueError(str(error)) from error  # without the remote traceback in the message
                raise error
            yield numbers[future]


def write_shard(folder: str, number: int, pieces: Sequence[Piece], tokenizer: str, dtype: str) -> None:
    """Write the tokens of a shard, and the indices at which documents begin in it."""
    encoder = tokenizer_of(tokenizer)
    parts, documents, count = [], [], 0
    for piece in pieces:
        if piece.begin == 0:
            documents.append(count)
        ids = encoder.encode(_text_of(piece))
        if piece.is_last:
            ids.append(encoder.end)
        parts.append(np.array(ids, dtype=dtype))
        count += len(ids)
    path = shard_file(Path(folder), number)
    _write(document_file(path), np.array(documents, dtype=np.int64))
    _write(path, np.concatenate(parts))


def _text_of(piece: Piece) -> str:
    """Return the text of a piece; raise a ValueError with the path if it is not UTF-8."""
    raw = lines_of(Path(piece.path), piece.begin, piece.end)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"paths must hold text in UTF-8, {piece.path} does not: {error.reason} in the lines from byte {piece.begin}"
        ) from error


def lines_of(path: Path, begin: int, end: int) -> bytes:
    """Return the lines that begin at bytes `begin` to `end`, whole: consecutive ranges give every line once."""
    with path.open("rb") as opened:
        if begin > 0:
            opened.seek(begin - 1)
            opened.readline()  # the rest of a line that began before `begin`
        first = opened.tell()
        if first >= end:
            return b""
        text = opened.read(end - first)
        return text if text.endswith(b"\n") else text + opened.readline()


def _write(path: Path, content: bytes | np.ndarray[Any, Any]) -> None:
    """Write a file atomically: to another name, and then renamed."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as opened:
        if isinstance(content, bytes):
            opened.write(content)
        else:
            np.save(opened, content)
    os.replace(part, path)


def _dtype_of(vocab_size: int) -> str:
    """Return the smallest unsigned dtype that holds all tokens."""
    return next(name for name in ("uint8", "uint16", "uint32") if vocab_size - 1 <= np.iinfo(name).max)


def _end_with_parent() -> None:
    """Exit this worker process when its parent ends: otherwise a worker of a killed process would wait forever."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()
