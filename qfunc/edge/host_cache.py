"""The host report in a file of the user's cache directory, for the next process; where that fails it is made anew."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from returns.result import Success

from qfunc.config.as_json import read_host_report, to_json
from qfunc.config.host_report import HostReport
from qfunc.edge.files import read_file, write_file

MOST_KEPT = 16
"""How many reports are kept, for as many versions of torch and qfunc, environments and CPUs; the oldest go."""

_ENVIRONMENT = re.compile(r"(ATEN|DNNL|FBGEMM|MKL|MKLDNN|ONEDNN|PYTORCH|QNNPACK|TORCH|XNNPACK)_")
"""The variables that may choose other kernels."""

_CPUINFO = frozenset(
    {
        *("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags"),
        *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features"),
    }
)


def kept(probe: Callable[[], HostReport]) -> HostReport:
    """The report that an earlier process kept, or that of `probe`, which is then kept for later ones."""
    path = _path()
    if path is None:
        return probe()
    found = _read(path)
    if found is None:
        found = probe()
        _write(path, found)
    return found


def forget() -> None:
    """Remove the kept report of this machine and version."""
    path = _path()
    if path is not None:
        with suppress(OSError, ValueError):
            path.unlink()


def directory() -> Path | None:
    """Where reports are kept: `QFUNC_CACHE`, or a folder where the platform keeps caches; None for nowhere."""
    own = os.environ.get("QFUNC_CACHE")
    if own is not None:
        return Path(own) if own else None
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "qfunc" / "Cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "qfunc"
    base = os.environ.get("XDG_CACHE_HOME", "")
    found = (Path(base) if os.path.isabs(base) else home / ".cache") / "qfunc"  # a relative one is to be ignored
    return found if found.is_absolute() else None


def _path() -> Path | None:
    folder = directory()
    if folder is None:
        return None
    try:
        key = json.dumps(list(_facts()))
    except OSError:  # sources that cannot be read: no key, no file
        return None
    return folder / f"host-{_digest(key.encode())}.json"


def _facts() -> Iterator[object]:
    """All that a report depends on."""
    yield torch.__version__, torch.version.git_version, torch.__config__.show()
    yield torch.backends.cpu.get_cpu_capability(), sorted(map(str, torch.cpu.get_capabilities().items()))
    yield sorted(map(str, torch.backends.quantized.supported_engines))
    yield platform.machine(), platform.processor(), platform.system(), platform.python_version(), sys.byteorder
    yield _cpuinfo()
    yield sorted((name, value) for name, value in os.environ.items() if _ENVIRONMENT.match(name))
    yield _sources()


def _cpuinfo() -> list[str]:
    """What Linux tells of the CPU's kind; its clock is not among it."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        rows = (line.partition(":") for line in file)
        return sorted({f"{name.strip()}:{value.strip()}" for name, _, value in rows if name.strip() in _CPUINFO})
    return []


def _sources() -> str:
    """A digest of qfunc's sources: kernels and their contracts stand on most of them."""
    package = Path(__file__).resolve().parents[1]
    paths = sorted(package.rglob("*.py"))
    if not paths:
        raise FileNotFoundError(package)  # in an archive, say
    return _digest(b"\0".join(part for path in paths for part in (str(path).encode(), path.read_bytes())))


def _read(path: Path) -> HostReport | None:
    """The report in a file; None for a file that is missing, damaged, or not of this user."""
    try:
        if hasattr(os, "geteuid") and path.stat().st_uid != os.geteuid():
            return None
    except (OSError, ValueError):
        return None
    digest, _, body = read_file(path).value_or(b"").partition(b"\n")
    if digest != _digest(body).encode():
        return None
    report: HostReport | None = read_host_report(body.decode(errors="replace")).value_or(None)
    return report


def _write(path: Path, report: HostReport) -> None:
    text = to_json(report)
    if not isinstance(text, Success):
        return
    body = text.unwrap().encode()
    with suppress(OSError, ValueError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(path, _digest(body).encode() + b"\n" + body)  # one that cannot be written is not kept
        _remove_oldest(path.parent)


def _remove_oldest(folder: Path) -> None:
    found = [path for path in folder.iterdir() if re.fullmatch(r"host-[0-9a-f]{64}\.json", path.name)]
    for path in sorted(found, key=lambda path: path.stat().st_mtime)[:-MOST_KEPT]:
        path.unlink()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
