"""The time per node of the pure passes on graphs of growing size.

    python -m tests.benchmarks.scaling

The graphs are chains of residual blocks (two convolutions with batch norms, ReLUs, a sum), copied node by node from
one traced block, because `torch.fx` would take longer to trace 20,000 nodes than all passes together to run on them.

As in `timeit`, the garbage collector is off: now and then it walks over all objects of the process, this program's
stages of all sizes among them, which says more about what a process holds than about a pass. `--collect` leaves it on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from pyrsistent import pmap
from torch import Tensor, nn

from qfunc import QConfig, QConfigMapping, check_host, convert, fuse, lower, prepare, trace
from qfunc import unwrap as get
from qfunc.backends import CPU
from qfunc.ir import Expression, Graph, ModuleFact, Node, Ref, digest, structure_digest, users, verify
from qfunc.numerics.observers import MinMax, PerChannelMinMax
from qfunc.numerics.qparams import INT8_NARROW_PER_CHANNEL
from qfunc.params import Load
from qfunc.passes.stages import Calibrated, Prepared
from qfunc.passes.statistics import Measured, Statistics
from tests.benchmarks.measure import interleaved, machine, table

SIZES = (200, 2_000, 20_000)
TARGET = 1.5
MAPPING = QConfigMapping().set_global(QConfig(MinMax(), PerChannelMinMax(INT8_NARROW_PER_CHANNEL)))
PASSES = ("fuse", "prepare", "convert", "lower")


class Block(nn.Module):
    """The basic block of He et al. 2015, without change of size."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Seven nodes."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


def chain(size: int) -> Graph:
    """A graph of about `size` nodes: copies of a block, one after the other. It cannot be materialized.

    >>> graph = chain(30)
    >>> len(graph), verify(graph).unwrap() is graph
    (30, True)
    """
    block = get(trace(Block().eval(), torch.randn(1, 2, 4, 4)))
    first, *body, last = block
    nodes, value = [first], first.id
    for index in range((size - 2) // len(body)):
        nodes += _renamed(body, index, {first.id: value})
        value = nodes[-1].id
    nodes.append(last.map(lambda leaf: Ref(value) if isinstance(leaf, Ref) else leaf))
    modules = {node.origin.module: ModuleFact(node.origin.type) for node in nodes if node.origin.module}
    return replace(block, nodes=pmap({n.id: n for n in nodes}), order=tuple(n.id for n in nodes), modules=pmap(modules))


def _renamed(body: list[Node], index: int, names: dict[str, str]) -> Iterator[Node]:
    names = {**names, **{node.id: f"b{index}_{node.id}" for node in body}}

    def leaf(value: Any) -> Any:
        match value:
            case Ref(id):
                return Ref(names[id])
            case Load(name):
                return replace(value, name=f"{index}.{name}")
            case Expression():
                raise TypeError(value)
            case _:
                return value

    for node in body:
        origin = replace(node.origin, module=f"{index}.{node.origin.module}")
        yield replace(node.map(leaf), id=names[node.id], origin=origin)


def calibrated(prepared: Prepared) -> Calibrated:
    """The stage as if every site had seen values from -1 to 2."""
    state = MinMax().update(MinMax().init(), torch.tensor([-1.0, 2.0]))
    measured = {fold.key: Measured(state, batches=1) for fold in prepared.folds}
    return Calibrated(prepared, Statistics(structure_digest(prepared.graph), measured=pmap(measured), batches=1))


def tasks(size: int) -> dict[str, Callable[[], Any]]:
    """Every pass on a graph of that size, on what the pass before it gave; and what all passes use."""
    graph = chain(size)
    fused = get(fuse(graph))
    prepared = get(prepare(fused, MAPPING))
    seen = calibrated(prepared)
    converted = get(convert(seen))
    host = check_host()
    return {
        # A new value of the same graph, because a value keeps its digest once that is known.
        "fuse": lambda: get(fuse(replace(graph))),
        "prepare": lambda: get(prepare(fused, MAPPING)),
        "convert": lambda: get(convert(seen)),
        "lower": lambda: get(lower(converted, host=host)),
        "digest": lambda: digest(replace(graph)),
        "users": lambda: users(graph),
        "verify": lambda: verify(graph),
        "nothing to fuse": lambda: get(fuse(replace(fused))),
    }


def measure(sizes: tuple[int, ...], repeats: int, collect: bool) -> dict[str, list[float]]:
    """Median microseconds per node of the traced graph, by task, for each size.

    Small graphs are processed many times at a stretch, so that all sizes are timed over about as many nodes.
    """
    table: dict[str, list[float]] = {}
    batches: dict[str, Callable[[], Any]] = {}
    for size in sizes:
        times = max(1, max(sizes) // size)
        for name, task in tasks(size).items():
            batches[f"{name} {size}"] = _repeated(task, times)
    seconds = interleaved(batches, repeats, clock=time.process_time, collect=collect)
    for key, value in seconds.items():
        name, _, size = key.rpartition(" ")
        nodes = int(size) * max(1, max(sizes) // int(size))
        table.setdefault(name, []).append(1e6 * value / nodes)
    return table


def _repeated(task: Callable[[], Any], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            task()

    return run


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--collect", action="store_true", help="leave Python's garbage collector on, see above")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sizes = tuple(options.sizes)
    found = measure(sizes, options.repeats, options.collect)
    rows = [(name, *values, values[-1] / values[0]) for name, values in found.items()]
    print(f"processor time, median of {options.repeats}; backend {CPU.name}; {machine()}")
    print(f"target: the passes' time per node at {sizes[-1]:,} at most {TARGET} times that at {sizes[0]:,}")
    print(table(("microseconds per node", *(f"{size:,}" for size in sizes), "last : first"), rows))


if __name__ == "__main__":
    main()
