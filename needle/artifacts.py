"""Derived data on disk: named after what it was made from, whole or not there, and never made twice.

An artifact is a folder with a manifest.json. It is written beside its final name and renamed at the end, so a kill, a
full disk or a second process can only ever leave the old state or the new one.
"""

import dataclasses
import datetime
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from needle.errors import ConfigError, DataError, UserError

MANIFEST_VERSION = 1
FULL = (errno.ENOSPC, errno.EDQUOT)
REPOSITORY = Path(__file__).resolve().parent.parent


def fingerprint(**parts: Any) -> str:
    """12 hexadecimal digits that equal parts share; dataclasses, paths and tuples may be among them."""
    text = json.dumps(_plain(parts), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def hash_once(path: Path) -> str:
    """The file's SHA-256, computed again only when its size or time changed: every call names it."""
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return _hashed(path.absolute(), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _hashed(path: Path, size: int, mtime_ns: int) -> str:
    return hash_file(path)


def hash_files(paths: Sequence[Path]) -> str:
    """One fingerprint of several files' names and contents, in order."""
    return fingerprint(files=[(Path(path).name, hash_file(path)) for path in paths])


def source_state() -> dict[str, Any]:
    """The commit of this code and whether the tree differs from it: `{"commit", "dirty"}`; unknown and null without
    git."""
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain")
    return {"commit": commit or "unknown", "dirty": None if status is None else bool(status)}


def require_clean(*, allow_dirty: bool) -> None:
    """Raises ConfigError where this code differs from its commit, unless that is allowed."""
    if not allow_dirty and source_state()["dirty"]:
        raise ConfigError(
            "the tree has uncommitted changes, so no run of it would be a result: commit them, or set allow_dirty=true"
        )


@contextmanager
def publish(folder: Path, *, kind: str, inputs: Mapping[str, Any], counts: Mapping[str, Any]) -> Iterator[Path]:
    """Yields a temporary folder to fill; on success it becomes `folder`, with a manifest, in one step.

    `inputs` and `counts` are read at the end, so they may be filled inside the block. If another process published the
    same artifact meanwhile, that one stays. On any error the temporary folder goes.

    Raises:
        UserError: the disk is full.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    temporary.mkdir()
    try:
        yield temporary
        manifest = {
            "schema_version": MANIFEST_VERSION,
            "kind": kind,
            "inputs": dict(inputs),
            "counts": dict(counts),
            **source_state(),
            "created_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        write_json_atomic(temporary / "manifest.json", manifest)
        for path in temporary.rglob("*"):
            _flush(path)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "manifest.json").is_file():
                raise
        _flush(folder.parent)
    except OSError as error:
        raise _disk_error(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds a lock file while the block runs; a process that dies lets go of it. Yields False, without `wait`, where
    another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def require(folder: Path, *, kind: str, command: str) -> dict[str, Any]:
    """The manifest of an artifact that must be there already.

    Raises:
        DataError: it is not, or is of another kind; the message names the command that makes it.
    """
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise DataError(f"{folder} ({kind}) is not there; run: {command}")
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}; delete {folder} and run: {command}") from error
    if manifest.get("kind") != kind:
        raise DataError(f"{folder} holds {manifest.get('kind')}, not {kind}; run: {command}")
    return manifest


def write_text_atomic(path: Path, text: str) -> None:
    """Writes beside `path`, flushes, renames. Raises UserError when the disk is full."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """As `write_text_atomic`."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _disk_error(path, error) from error


def write_json_atomic(path: Path, value: Any) -> None:
    write_text_atomic(path, json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n")


def _disk_error(path: Path, error: OSError) -> Exception:
    """The error as a user should read it: a full disk is theirs to mend, anything else stays what it is."""
    if error.errno not in FULL:
        return error
    free_mib = shutil.disk_usage(Path(path).parent).free / 2**20
    return UserError(
        f"cannot write {path}: the disk is full ({free_mib:.1f} MiB free); free some space and run this again"
    )


def _remove_stale(folder: Path) -> None:
    """Temporary folders of this artifact whose process is gone."""
    for path in folder.parent.glob(f".{folder.name}.*.part"):
        owner = path.name.split(".")[-2]
        if not (owner.isdigit() and _is_running(int(owner))):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process_id != os.getpid()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
