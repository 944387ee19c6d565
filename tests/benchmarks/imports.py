"""The time that `import qfunc` adds to `import torch`, in fresh processes.

python -m tests.benchmarks.imports
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.measure import machine, table

ROOT = Path(__file__).resolve().parents[2]
TARGET = 0.3
_CODE = "import time, torch; t, p = time.perf_counter(), time.process_time(); import qfunc; "
_CODE += "print(time.perf_counter() - t, time.process_time() - p)"


def seconds(repeats: int) -> list[tuple[float, float]]:
    """Wall and processor seconds of each import, after one that compiles the sources."""
    with tempfile.TemporaryDirectory() as cache:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment = {**kept, "PYTHONPYCACHEPREFIX": cache, "PYTHONPATH": str(ROOT)}
        found = []
        for _ in range(repeats + 1):
            done = subprocess.run(
                [sys.executable, "-c", _CODE], env=environment, check=True, cwd=ROOT, capture_output=True, text=True
            )
            wall, processor = map(float, done.stdout.split())
            found.append((wall, processor))
    return found[1:]


def loaded(*modules: str) -> tuple[str, ...]:
    """Those of the modules that `import qfunc` loads and `import torch` does not."""
    code = "import sys, torch; before = set(sys.modules); import qfunc; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    return tuple(sorted(set(modules) & set(done.stdout.split())))


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    columns = list(zip(*seconds(options.repeats), strict=True))
    rows = [
        (name, statistics.median(values), min(values))
        for name, values in zip(("wall", "processor"), columns, strict=True)
    ]
    print(f"{options.repeats} imports, target {TARGET}; {machine()}")
    print(table(("seconds", "median", "least"), rows))


if __name__ == "__main__":
    main()
