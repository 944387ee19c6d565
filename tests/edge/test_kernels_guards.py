"""What oneDNN and aten read out of bounds on, or end the process on, is refused before they are called.

The script runs in a process of its own, which must come to its end.
"""

from __future__ import annotations

import subprocess
import sys

REFUSED = {
    "a float weight": "conv(weight=torch.ones(6, 4, 3, 3))",
    "a weight of nothing": "conv(weight=torch.ones(6, 0, 3, 3, dtype=torch.int8))",
    "no output channels": "conv(weight=torch.ones(0, 4, 3, 3, dtype=torch.int8), scale=torch.ones(0))",
    "too few scales": "conv(scale=torch.ones(5))",
    "scales of float64": "conv(scale=torch.ones(6, dtype=torch.float64))",
    "too short a bias": "conv(bias=torch.ones(3))",
    "a bias of integers": "conv(bias=torch.ones(6, dtype=torch.int32))",
    "groups that do not divide": "conv(groups=4)",
    "a stride for one dimension": "conv(stride=(1,))",
    "padding for three dimensions": "conv(padding=(1, 1, 1))",
    "qparams of a float result": "ConvCall(1.0, 0, 2.0, 3, 'float32', (1, 1), (1, 1), (1, 1), 1)",
    "other channels": "conv()(torch.zeros(2, 5, 8, 8).byte())",
    "floats": "conv()(torch.zeros(2, 4, 8, 8))",
    "one axis": "conv()(torch.zeros(4).byte())",
    "an image smaller than the window": "conv(padding=(0, 0))(torch.zeros(2, 4, 2, 2).byte())",
    "a sum in three dimensions": "OnednnConvAdd(torch.ones(6, 4, 3, 3, 3, dtype=torch.int8), torch.ones(6), None, "
    "ConvCall(1.0, 0, 1.0, 0, 'uint8', (1,) * 3, (1,) * 3, (1,) * 3, 1), Affine(1.0, 0))",
    "a sum of another shape": "added()(torch.zeros(2, 4, 8, 8).byte(), torch.zeros(2, 6, 5, 5).byte())",
    "a sum of other channels": "added()(torch.zeros(2, 4, 8, 8).byte(), torch.zeros(2, 5, 8, 8).byte())",
    "a linear weight of three axes": "linear(weight=torch.ones(5, 4, 3, dtype=torch.int8))",
    "an empty linear weight": "linear(weight=torch.ones(5, 0, dtype=torch.int8))",
    "too few linear scales": "linear(scale=torch.ones(4))",
    "other features": "linear()(torch.zeros(3, 7).byte())",
    "an unknown post-op": "KernelPostOp('cube')",
    "an unknown algorithm": "KernelPostOp('gelu', algorithm='exact')",
    "an algorithm for none": "KernelPostOp('relu', algorithm='tanh')",
    "too many numbers": "KernelPostOp('relu', (1.0,))",
    "crossed bounds": "KernelPostOp('hardtanh', (6.0, 0.0))",
    "a post-op that sums do not have": "added(post_op=KernelPostOp('silu'))",
    "a pool of four dimensions": "MaxPool((2,) * 4, (2,) * 4, (0,) * 4, (1,) * 4)",
    "a window of padding alone": "MaxPool((2, 2), (2, 2), (2, 2), (1, 1))(torch.zeros(1, 2, 4, 4).byte())",
    "a table of too few entries": "Table(torch.zeros(255))",
}
SCRIPT = """
import torch
from qfunc.edge.kernels.affine import Table
from qfunc.edge.kernels.conv import ConvCall, OnednnConv, OnednnConvAdd
from qfunc.edge.kernels.linear import LinearCall, OnednnLinear
from qfunc.edge.kernels.pool import MaxPool
from qfunc.edge.kernels.post_op import KernelPostOp
from qfunc.numerics.grid import Affine

NONE = KernelPostOp("none")

def conv(weight=None, scale=None, bias=None, groups=1, stride=(1, 1), padding=(1, 1)):
    weight = torch.ones(6, 4, 3, 3, dtype=torch.int8) if weight is None else weight
    call = ConvCall(1.0, 0, 1.0, 0, "uint8", stride, padding, (1, 1), groups)
    return OnednnConv(weight, torch.ones(6) if scale is None else scale, bias, call)

def added(post_op=NONE):
    call = ConvCall(1.0, 0, 1.0, 0, "uint8", (1, 1), (1, 1), (1, 1), 1, "zeros", post_op)
    return OnednnConvAdd(torch.ones(6, 4, 3, 3, dtype=torch.int8), torch.ones(6), None, call, Affine(1.0, 0))

def linear(weight=None, scale=None):
    weight = torch.ones(5, 8, dtype=torch.int8) if weight is None else weight
    return OnednnLinear(weight, torch.ones(5) if scale is None else scale, None, LinearCall(1.0, 0, 1.0, 0, "uint8"))

assert conv()(torch.zeros(2, 4, 8, 8).byte()).shape == (2, 6, 8, 8)
assert added()(torch.zeros(2, 4, 8, 8).byte(), torch.zeros(2, 6, 8, 8).byte()).shape == (2, 6, 8, 8)
assert linear()(torch.zeros(3, 8).byte()).shape == (3, 5)
for name, text in CASES.items():
    try:
        eval(text)
        print(name, "passes", flush=True)
    except (RuntimeError, AssertionError, ValueError, IndexError):
        print(name, "is refused", flush=True)
"""


def test_what_could_end_the_process_is_refused() -> None:
    script = SCRIPT.replace("CASES", repr(REFUSED))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"{name} is refused" for name in REFUSED]), done.stderr
