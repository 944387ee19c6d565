"""Files that are whole at any time: what a killed process leaves beside them, and several that write at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qfunc import unwrap
from qfunc.edge.files import read_file, write_file

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "0123456789abcdef"

_KILLED = """
import os, signal, sys
from qfunc.edge.files import write_file
def kill(_):
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = kill
write_file(sys.argv[1], b"half")
"""


@pytest.mark.parametrize("name", ["checkpoint", "n" * 255])
def test_what_a_killed_process_left_is_removed_by_the_next_write(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    unwrap(write_file(path, b"old"))
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(path)], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    assert unwrap(read_file(path)) == b"old"
    unwrap(write_file(tmp_path / f"{name[:-1]}2", b"another"))
    assert len(os.listdir(tmp_path)) == 3
    unwrap(write_file(path, b"new"))
    assert sorted(os.listdir(tmp_path)) == sorted([name, f"{name[:-1]}2"])
    assert unwrap(read_file(path)) == b"new"


def test_nothing_else_is_removed(tmp_path: Path) -> None:
    names = [
        ".file.tmp",
        f".file.{TOKEN}",
        f".file.{TOKEN}.tmp2",
        f".file.{TOKEN}0.tmp",
        f".file.{TOKEN.upper()}.tmp",
        f".file2.{TOKEN}.tmp",
        f".fil.{TOKEN}.tmp",
        f"file.{TOKEN}.tmp",
        f"..file.{TOKEN}.tmp",
        f".file.{TOKEN}.tmp\n",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    folder, link = f".file.{TOKEN[::-1]}.tmp", f".file.{'0' * 16}.tmp"
    (tmp_path / folder).mkdir()
    (tmp_path / link).symlink_to(tmp_path / names[0])
    os.mkfifo(tmp_path / f".file.{'1' * 16}.tmp")
    (tmp_path / f".file.{TOKEN}.tmp").write_bytes(b"stale")
    unwrap(write_file(tmp_path / "file", b"new"))
    assert sorted(os.listdir(tmp_path)) == sorted([*names, folder, link, f".file.{'1' * 16}.tmp", "file"])


@pytest.mark.skipif(sys.platform == "win32", reason="what is open cannot be removed there")
def test_what_a_process_is_writing_stays(tmp_path: Path) -> None:
    import fcntl

    beside = tmp_path / f".file.{TOKEN}.tmp"
    with open(beside, "xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        unwrap(write_file(tmp_path / "file", b"new"))
        assert beside.exists()
    unwrap(write_file(tmp_path / "file", b"newer"))
    assert not beside.exists()


def test_several_may_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with ThreadPoolExecutor(max_workers=4) as pool:
        written = list(pool.map(lambda index: write_file(path, b"%d" % index * 1000), range(60)))
    assert [found.unwrap() for found in written] == [None] * 60
    assert unwrap(read_file(path)) in {b"%d" % index * 1000 for index in range(60)}
    assert os.listdir(tmp_path) == ["file"]
