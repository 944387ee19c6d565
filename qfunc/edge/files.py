"""Files that are whole at any time, whatever ends the process that writes them."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from os import PathLike
from secrets import token_hex

from returns.result import Failure, Success

from qfunc.edge.container import ANOTHER, MOST_BYTES
from qfunc.errors import BadFile, told
from qfunc.result import R

if sys.platform != "win32":
    import fcntl


def write_file(path: str | PathLike[str], data: bytes) -> R[None]:
    """Write a file so that at any time there is the old one or the new one, whole; `BadFile` where that fails.

    The new one is written beside it. What a process that was killed left there is removed by the next write.
    """
    place = os.fspath(path)
    try:
        # Replacing a link would leave the file behind it as it was.
        target = os.path.realpath(place)
        folder, name = os.path.split(target)
        _remove_stale(folder, name)
        while not _replaced(target, os.path.join(folder, f"{_stem(name)}.{token_hex(8)}.tmp"), data):
            pass
        _sync(folder)
    except (OSError, ValueError) as error:
        reason = f"it cannot be written: {told(error)}"
        return Failure(BadFile(place, reason, "give the path of a file in a folder that exists and can be written to"))
    return Success(None)


def _stem(name: str) -> str:
    """How temporaries of a file begin: short, because its own name may have all the length that a name can have."""
    if len(name) <= 40:
        return f".{name}"
    return f".{name[:40]}.{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"


def _replaced(target: str, beside: str, data: bytes) -> bool:
    """Write a file and put it in place of another; False if it was removed before it was seen to be in use."""
    try:
        with ExitStack() as held:
            with open(beside, "xb") as file:
                if not held.enter_context(_in_use(file.fileno())):
                    return False
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
    except BaseException:
        # Ctrl-C too leaves nothing behind.
        if os.path.lexists(beside):
            os.unlink(beside)
        raise
    return True


@contextmanager
def _in_use(descriptor: int) -> Iterator[bool]:
    """Lock an open file, beyond its closing; whether it still has a name. The system unlocks those of the dead."""
    if sys.platform == "win32":
        # What is open cannot be removed there.
        yield True
        return
    own = os.dup(descriptor)
    try:
        with suppress(OSError):
            # Where files cannot be locked nothing is taken for stale.
            fcntl.flock(own, fcntl.LOCK_EX)
        yield os.fstat(own).st_nlink > 0
    finally:
        os.close(own)


def _remove_stale(folder: str, name: str) -> None:
    """Remove the temporaries of a file that no process is writing."""
    ours = re.compile(re.escape(_stem(name)) + r"\.[0-9a-f]{16}\.tmp")
    with suppress(OSError):
        for found in os.listdir(folder):
            if ours.fullmatch(found):
                with suppress(OSError):
                    _remove_unused(os.path.join(folder, found))


def _remove_unused(path: str) -> None:
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return
    if sys.platform == "win32":
        os.unlink(path)
        return
    opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    finally:
        os.close(opened)


def _sync(folder: str) -> None:
    """Make a new name last, where the system can; the file itself is whole either way."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def read_file(path: str | PathLike[str]) -> R[bytes]:
    """The bytes of a file; `BadFile` where it is missing, cannot be read, or is too large or no plain file."""
    place = os.fspath(path)
    try:
        about = os.stat(place)
        if not stat.S_ISREG(about.st_mode):
            return Failure(BadFile(place, "it is no plain file", "give the path of a file"))
        if about.st_size > MOST_BYTES:
            return Failure(BadFile(place, f"it has {about.st_size} bytes, the most are {MOST_BYTES}", ANOTHER))
        with open(place, "rb") as file:
            return Success(file.read(MOST_BYTES))
    except (OSError, ValueError) as error:
        reason = f"it cannot be read: {told(error)}"
        return Failure(BadFile(place, reason, "give the path of a file that exists and can be read"))
