"""The README's Python blocks run, in order, and print what it shows."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
# Fences with what is between, and the line before them.
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A Python block, its line in the README, and the output shown behind it."""

    line: int
    code: str
    output: str


def blocks(text: str) -> list[Block]:
    found = list(_FENCE.finditer(text))
    return [
        Block(text[: here.start()].count("\n") + 2, here[2], after[2] if after[1] == "text" else "")
        for here, after in zip(found, [*found[1:], found[-1]], strict=True)
        if here[1] == "python"
    ]


def anywhere(output: str) -> str:
    """Output without what depends on the CPU (its name, whether weights had to be limited) or on the README's lines."""
    output = re.sub(r"^weights are limited .*\n", "", output, flags=re.MULTILINE)
    output = re.sub(r"README.md:\d+", "README.md:1", output)
    return re.sub(r"(engine \w+) on [^:]+:", r"\1 on this CPU:", output)


def run(code: str, line: int, namespace: dict[str, object]) -> str:
    padded = "\n" * (line - 1) + code
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(padded, str(README), "exec"), namespace)
    return printed.getvalue()


def test_readme_prints_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)  # where dataclasses look for themselves
    for block in blocks(README.read_text()):
        printed = run(block.code, block.line, vars(module))
        assert anywhere(printed).rstrip() == anywhere(block.output).rstrip(), f"README.md:{block.line}"


@pytest.mark.parametrize("name", ["quickstart", "test"])
def test_readme_has_the_commands_that_set_up(name: str) -> None:
    command = re.search(rf"^<!-- {name} -->\n```sh\n(.*)\n```$", README.read_text(), re.MULTILINE)
    assert command is not None
    assert command[1].startswith("python3 -m venv .venv && .venv/bin/pip install")
