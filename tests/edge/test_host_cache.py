"""The kept host report: it saves time, and nothing else tells whether there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qfunc import HostReport, check_host
from qfunc.edge import host_cache


@pytest.fixture
def report() -> HostReport:
    return check_host()


@pytest.fixture
def folder(report: HostReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of its own, from when the report of this process is known."""
    monkeypatch.setenv("QFUNC_CACHE", str(tmp_path / "of" / "qfunc"))
    return tmp_path / "of" / "qfunc"


class Probe:
    """Counts how often the machine is probed."""

    def __init__(self, report: HostReport) -> None:
        self.report, self.times = report, 0

    def __call__(self) -> HostReport:
        self.times += 1
        return self.report


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def test_a_report_is_probed_once_and_equal_ever_after(folder: Path, report: HostReport) -> None:
    probe = Probe(report)
    found = [host_cache.kept(probe) for _ in range(3)]
    assert found == [report] * 3
    assert probe.times == 1
    (path,) = files(folder)
    if os.name == "posix":
        assert folder.stat().st_mode & 0o077 == 0
    host_cache.forget()
    assert host_cache.kept(probe) == report
    assert probe.times == 2
    assert files(folder) == [path]


def damages(data: bytes) -> Iterator[bytes]:
    digest, _, body = data.partition(b"\n")
    yield b""
    yield data[:-20]
    yield body
    yield data.replace(b"true", b"false", 1)
    yield b"0" * 64 + b"\n" + body
    yield b"\xff" * 100
    text = b'{"qfunc": "QConfigMapping", "version": 1}'
    yield host_cache._digest(text).encode() + b"\n" + text
    yield digest


@pytest.mark.parametrize("index", range(8))
def test_a_damaged_or_foreign_file_is_ignored_and_replaced(index: int, folder: Path, report: HostReport) -> None:
    probe = Probe(report)
    host_cache.kept(probe)
    (path,) = files(folder)
    whole = path.read_bytes()
    path.write_bytes(list(damages(whole))[index])
    assert host_cache.kept(probe) == report
    assert probe.times == 2
    assert path.read_bytes() == whole


def test_a_place_that_cannot_be_written_is_no_error(
    tmp_path: Path, report: HostReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    for place in (tmp_path / "file" / "below", tmp_path / "file", Path("/proc/nowhere"), Path("\0")):
        with monkeypatch.context() as patch:
            patch.setattr(host_cache, "directory", lambda place=place: place)
            probe = Probe(report)
            assert [host_cache.kept(probe) for _ in range(2)] == [report] * 2
            assert probe.times == 2
            host_cache.forget()


def test_a_folder_in_place_of_the_file_is_no_error(folder: Path, report: HostReport) -> None:
    probe = Probe(report)
    host_cache.kept(probe)
    (path,) = files(folder)
    path.unlink()
    path.mkdir()
    assert host_cache.kept(probe) == report
    host_cache.forget()
    assert probe.times == 2


def test_an_empty_name_keeps_nothing(monkeypatch: pytest.MonkeyPatch, report: HostReport) -> None:
    monkeypatch.setenv("QFUNC_CACHE", "")
    probe = Probe(report)
    assert host_cache.directory() is None
    assert [host_cache.kept(probe) for _ in range(2)] == [report] * 2
    assert probe.times == 2


@pytest.mark.parametrize("name", ["ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "FBGEMM_ENABLE_X"])
def test_what_changes_kernels_changes_the_file(
    name: str, folder: Path, report: HostReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_cache.kept(Probe(report))
    monkeypatch.setenv(name, "default")
    other = replace(report, verdicts=())
    assert host_cache.kept(Probe(other)) == other
    assert len(files(folder)) == 2
    monkeypatch.delenv(name)
    assert host_cache.kept(Probe(other)) == report


def test_only_the_newest_are_kept(folder: Path, report: HostReport, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("not qfunc's")
    for number in range(host_cache.MOST_KEPT + 3):
        monkeypatch.setenv("ONEDNN_TEST", str(number))
        host_cache.kept(Probe(report))
    assert len(files(folder)) == host_cache.MOST_KEPT + 1
    assert (folder / "mine.txt").exists()


def test_where_caches_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QFUNC_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert host_cache.directory() == tmp_path / "xdg" / "qfunc"
    for unusable in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert host_cache.directory() == tmp_path / ".cache" / "qfunc"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert host_cache.directory() == tmp_path / "Library" / "Caches" / "qfunc"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert host_cache.directory() == tmp_path / "local" / "qfunc" / "Cache"


SCRIPT = """
import sys
import qfunc.edge.host as edge
if sys.argv[1] == "read":
    edge._probed = lambda: sys.exit("probed again")
print(repr(edge.check_host(fresh=sys.argv[1] == "fresh")))
"""


def test_another_process_reads_what_one_has_kept(tmp_path: Path, report: HostReport) -> None:
    environment = {**os.environ, "QFUNC_CACHE": str(tmp_path), "PYTHONPATH": "."}

    def run(how: str) -> str:
        command = [sys.executable, "-c", SCRIPT, how]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    assert run("write") == repr(report)
    (path,) = tmp_path.iterdir()
    assert run("read") == repr(report)
    path.write_text("damaged")
    assert run("fresh") == repr(report)
    assert run("read") == repr(report)


def test_a_fresh_report_is_an_equal_one(folder: Path, report: HostReport) -> None:
    try:
        assert check_host(fresh=True) == report
        assert len(files(folder)) == 1
    finally:
        assert check_host() == report
