"""Files: outputs that can be written and are the script's own, locks, JSON, hashes."""

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import cem
from lib import cli, distributed

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def make_folder(folder: Path) -> None:
    """Make a folder in which files can be written; cli.run removes it again if it stays empty.

    Raises CEMError if it cannot be written.
    """
    folder = folder.absolute()
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            cli.AT_END.callback(_remove_if_empty, path)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise cem.CEMError(f"cannot write to {folder}: {error.strerror}") from error


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def lock(folder: Path, busy: str, until: ExitStack | None = None) -> None:
    """Lock the folder itself until the script ends, or `until`, in the first process of torchrun.

    Raises CEMError, with the message `busy`, if another process has locked it.
    """
    if distributed.rank():
        return
    if fcntl is None:
        cli.warn("this system has no file locks: start one run at a time")
        return
    descriptor = os.open(folder, os.O_RDONLY)
    end = until or cli.AT_END
    end.callback(os.close, descriptor)  # which unlocks, as the death of the process does
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        current = os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except (BlockingIOError, FileNotFoundError):  # locked, or removed by the one who had the lock
        current = False
    except OSError:
        cli.warn(f"{folder} is on a file system without locks: start one run at a time")
        return
    cem.require(current, busy)


def check_output(path: Path, is_ours: Callable[[Path], bool], *beside: Path) -> None:
    """Raise CEMError unless `path` and the files beside it can be written, and what is there was
    written by this script: those beside it are ours if `path` is."""
    make_folder(path.parent)
    for file in (path, *beside):
        if file.is_symlink() or file.exists():
            ours = file.is_file() and not file.is_symlink() and is_ours(path)
            cem.require(ours, f"{file} exists and this script did not write it: use another file")


def json_with(*keys: str) -> Callable[[Path], bool]:
    """A test for check_output: whether a file is a JSON object with these keys."""

    def is_ours(path: Path) -> bool:
        content = read_json(path)
        return isinstance(content, dict) and content.keys() >= set(keys)

    return is_ours


def read_json(path: Path) -> object:
    """The content of a JSON file, None if it is missing, not a regular file or not JSON."""
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def keep_other(path: Path, *beside: Path) -> None:
    """Rename the result of another command at `path`, and files beside it, to <name>-1, -2, ..."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("command") == cli.command():
        return
    for number in itertools.count(1):
        moved = [p.with_stem(f"{p.stem}-{number}") for p in (path, *beside)]
        if not any(map(os.path.lexists, moved)):
            break
    for old, new in zip((path, *beside), moved):
        if old.exists():
            os.replace(old, new)
    print(f"kept the result of another command as {moved[0]}")


def write_text(path: Path, text: str) -> None:
    cem.write_atomically(path, lambda file: file.write(text.encode()))
