"""The rules of the source tree, held by a walk over its syntax: layers, banned imports, sizes, names."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "qfunc").rglob("*.py"))

# A module imports only from its own layer and from those before it. `qfunc/__init__.py` is the layer "__init__".
LAYERS = (
    "errors", "result", "numerics", "ir", "ops", "match", "params", "config", "backends", "engines", "passes", "recipe",
    "edge", "artifact", "quantize", "__init__", "compat", "testing",
)  # fmt: skip
BANNED = ("torch.ao", "torch.quantization", "torchao")
MAY_IMPORT_BANNED = {"qfunc/testing/oracle.py", "qfunc/testing/oracle_training.py", "qfunc/edge/decomposed.py"}
FORBIDDEN_NAMES = ("utils", "helper", "manager", "handler")
MOST_LINES = 450

each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())


def layer(module: str) -> str:
    """The layer of a dotted module name: "qfunc.ir.graph" is in "ir"."""
    return [*module.split("."), "__init__"][1]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, wherever in it, also by `import_module("...")`."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parents = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                base = ".".join([*parents, *([module] if module else [])])
                yield from (f"{base}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Name(id="import_module" | "__import__"), args=[ast.Constant(value=str(name)), *_]):
                yield name
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield name


def attribute_chains(path: Path) -> Iterator[str]:
    """Every dotted expression of a file, such as "torch.ops.onednn"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def source_layer(name: str) -> str:
    """The layer that an imported name comes from: `from qfunc import x` reads x's own layer if x is a module."""
    known = layer(name)
    is_module = (ROOT / "qfunc" / known).is_dir() or (ROOT / "qfunc" / f"{known}.py").is_file()
    return known if is_module else "__init__"


@each
def test_imports_point_down(path: Path) -> None:
    own = layer(module_name(path))
    assert own in LAYERS, f"{own} has no place in LAYERS"
    for name in imports(path):
        if name.split(".")[0] == "qfunc":
            assert LAYERS.index(source_layer(name)) <= LAYERS.index(own), f"{own} imports {name}"


@each
def test_no_torch_ao(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() in MAY_IMPORT_BANNED:
        return
    for name in (*imports(path), *attribute_chains(path)):
        assert not any(f"{name}.".startswith(f"{banned}.") for banned in BANNED), name


@each
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


@each
def test_names_say_what_they_name(path: Path) -> None:
    tree = ast.parse(path.read_text())
    defined = [n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    for name in (*path.relative_to(ROOT).with_suffix("").parts, *defined):
        assert not any(word in name.lower() for word in FORBIDDEN_NAMES), name


def test_the_walk_sees_every_form_of_import(tmp_path: Path) -> None:
    tree = tmp_path / "qfunc"
    tree.mkdir()
    source = "import torch.ao.nn as a\ndef f():\n    from torch import ao\n    from torch.ao.quantization import b\n"
    (tree / "x.py").write_text(source + "    importlib.import_module('torchao.c')\n")
    found = set(_imports_under(tree / "x.py", tmp_path))
    assert found == {"torch.ao.nn", "torch.ao", "torch.ao.quantization.b", "torchao.c"}


def _imports_under(path: Path, root: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "ROOT", root)
        yield from imports(path)


@pytest.mark.parametrize("seed", ["1", "2"])
def test_import_works_under_any_hash_seed(seed: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    code = "import qfunc; print(sorted(name for name in dir(qfunc) if not name.startswith('_')))"
    subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, check=True, cwd=ROOT)
