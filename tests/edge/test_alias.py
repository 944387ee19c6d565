"""In-place operators and shared memory, written out: what becomes out-of-place, what stays, and that both are exact."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import nn

from qfunc.edge.materialize import materialize
from qfunc.edge.trace import trace
from qfunc.ir import Graph
from qfunc.result import unwrap
from qfunc.testing import same_bits
from tests.laws.test_trace import holds


def model(source: str, **attributes: object) -> nn.Module:
    """A module whose `forward(self, x)` has these lines."""
    body = "\n".join("    " + line for line in source.strip().splitlines())
    scope = {"torch": torch, "nn": nn, "F": F}
    exec(f"def forward(self, x):\n{body}", scope)
    made = type("Model", (nn.Module,), {"forward": scope["forward"]})()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made.eval()


SOURCES = {
    "relu then old name": "y = x * 2\ny.relu_()\nreturn y + 1",
    "result and old name": "y = x * 2\nz = y.relu_()\nreturn y + z",
    "view written, base read": "y = x * 2\nz = y.reshape(-1)\nz.relu_()\nreturn y + 1",
    "view written by a module, base read": "y = x * 2\nz = y.flatten(1)\nw = self.relu(z)\nreturn y + 1, w",
    "base written, view read": "y = x * 2\nz = y.t()\ny.mul_(3)\nreturn z + 1",
    "base written twice, view in between": "y = x * 2\ny.relu_()\nz = y.view(-1)\ny.add_(1)\nreturn z, y",
    "view dead before": "y = x * 2\nz = y.t() + 1\ny.add_(z.t())\nreturn y",
    "view taken after": "y = x * 2\ny.add_(1)\nreturn y.t(), y",
    "chain": "y = x * 2\ny.relu_().add_(1).mul_(2)\nreturn y",
    "augmented": "y = x * 2\nz = y\ny += 1\nreturn z",
    "augmented by itself": "y = x * 2\ny += y\nreturn y",
    "augmented view": "y = x * 2\nz = y.t()\nz += 1\nreturn y",
    "augmented number": "n = x.size(0)\nm = n\nn += 1\nreturn x + m, x + n, m, n",
    "augmented shape": "s = x.shape\nt = s\ns += (1,)\nreturn x.reshape(s), x.reshape(t)",
    "augmented number of a shape": "n = x.shape[0]\nm = n\nn *= 2\nreturn m, n",
    "other augmented": "y = x * 2\nz = y\ny -= 1\ny /= 2\ny **= 2\nreturn z",
    "augmented chunk": "a, b = (x * 2).chunk(2, 1)\nc = a\na += b\nreturn c, b",
    "matmul augmented": "y = x * 2\nz = y\ny = y @ y.t()\nreturn y, z",
    "item": "y = x * 2\ny[:, 0] = 0.5\nreturn y",
    "item, view read": "y = x * 2\nz = y.t()\ny[0] = z[0, 0]\nreturn z",
    "item of an input": "x[0] = 1.0\nreturn x * 2",
    "input": "x.relu_()\nreturn x + 1",
    "input by a module": "return self.relu(x) + x",
    "view of the input": "y = x.view(-1)\ny.add_(1)\nreturn x",
    "input augmented": "y = x\ny += 1\nreturn x",
    "read before a write": "y = x * 2\na = y + 1\nb = y.t()\nb.add_(1)\nreturn a, F.relu(a), y",
    "function switched on": "y = x * 2\nz = y.view(-1)\nF.celu(y, 0.1, True)\nreturn z",
    "function switched on by keyword": "y = x * 2\nF.selu(y, inplace=True)\nreturn y",
    "function in another order": "y = x * 2\nF.relu(inplace=True, input=y)\nreturn y",
    "positional switch": "y = x * 2\nz = y.t()\nF.relu(y, True)\nreturn z",
    "out": "y = x * 2\nz = y.t()\ntorch.add(x, 1, out=y)\nreturn z, y",
    "two outs": "a, b = x[0] * 2, x[0].long()\ntorch.max(x, 0, out=(a, b))\nreturn a, b",
    "unknown module": "y = x * 2\nz = y.t()\nself.mish(y)\nreturn z, y",
    "unknown method": "y = x * 2\ny.neg_()\nreturn y",
    "fill": "y = x * 2\nz = y[0]\nz.zero_()\nreturn y",
    "dropout is an alias": "y = x * 2\nz = self.drop(y)\nz.add_(1)\nreturn y",
    "identity is an alias": "y = x * 2\nz = self.same(y)\nz.add_(1)\nreturn y",
    "contiguous is an alias": "y = x * 2\nz = y.contiguous()\nz.add_(1)\nreturn y",
    "to is an alias": "y = x * 2\nz = y.to(torch.float32)\nz.add_(1)\nreturn y, z",
    "float is an alias": "y = x * 2\nz = y.float()\nz.add_(1)\nreturn y",
    "einsum is an alias": "y = x * 2\nz = torch.einsum('ij->ji', y)\nz.add_(1)\nreturn y",
    "atleast is an alias": "y = x * 2\nz = torch.atleast_2d(y)\nz.add_(1)\nreturn y",
    "expand_as and detach": "y = x * 2\nz = y.detach()\nz.add_(1)\nreturn y",
    "alpha dropout is an alias": "y = x * 2\nz = self.alpha(y)\nz.add_(1)\nreturn y",
    "split": "a, b = (x * 2).split(2, 1)\na.add_(b)\nreturn torch.cat((a, b), 1)",
    "chunk": "y = x * 2\na, b = y.chunk(2, 1)\na.add_(1)\nreturn y, b",
    "parts by functions": "y = x * 2\na = torch.split(y, 2, 1)[0]\nb = torch.chunk(y, 4, 1)[3]\na += b\nreturn y",
    "part of parts": "y = x * 2\na = y.split(1, 1)[1:3][0]\na.mul_(3)\nreturn y",
    "narrow": "y = x * 2\na = y.narrow(1, 0, 2)\na.sub_(1)\nreturn y",
    "expand": "y = x * 2\na = y.expand(2, 4, 4)\ny.div_(3)\nreturn a",
    "broadcast_to": "y = x * 2\na = torch.broadcast_to(y, (2, 4, 4))\ny.masked_fill_(y > 0, 1)\nreturn a",
    "unflatten": "y = x * 2\na = y.unflatten(1, (2, 2))\na.relu_()\nreturn y",
    "detach": "y = x * 2\na = torch.detach(y)\na.relu_()\nreturn y",
    "getitem of getitem": "y = x * 2\na = y[1:][..., 0]\na -= 1\nreturn y",
    "repeat is no alias": "y = x * 2\na = y.repeat(1, 1)\na.add_(1)\nreturn y, a",
    "interpolate is taken for an alias": "y = (x * 2)[None]\na = F.interpolate(y, size=4)\na.add_(1)\nreturn y, a",
    "shape in place": "y = x * 2\ny.unsqueeze_(0).transpose_(0, 2)\nreturn y.squeeze_(1)",
    "shape in place, old name": "y = x * 2\nz = y\ny.unsqueeze_(0)\nreturn z + 1, y",
    "shape in place of a view": "y = x * 2\nz = y[1]\nz.unsqueeze_(0)\nz.add_(1)\nreturn y, z",
    "shape in place of an input": "x.unsqueeze_(0)\nreturn x + 1",
    "detach in place": "y = x * 2\ny.detach_()\ntorch.detach_(y)\nreturn y + 1",
    "differences and quotients": "y = x * 2\nz = y\ny -= 1\ny /= 2\ny //= 3\nreturn z",
    "differences and quotients by methods": "y = x * 2\nz = y\ny.sub_(1).div_(2).floor_divide_(0.5)\nreturn z",
    "quotient of a number": "n = x.size(0)\nm = n\nn //= 2\nreturn x[:n], m / 2 - n",
    "unbind": "y = x * 2\na = y.unbind(0)[0]\na.add_(1)\nreturn y",
    "one module at two sites": "y = x * 2\na = self.relu(y)\nb = a.t()\nc = self.relu(b - 1)\nreturn y, c, b",
    "one module, kept and not": "y = x * 2\nv = y.t()\nself.relu(y)\nz = x - 1\nw = self.relu(z)\nreturn v, w",
    "dtype is kept": "y = x.half()\ny += x\nreturn y",
    "dtype is kept by a method": "y = x.half() * 2\ny.add_(x)\nreturn y",
    "buffer": "self.count.add_(1)\nreturn x + self.count",
    "buffer read before": "a = self.count * 2\nself.count.mul_(3)\nreturn x + self.count, a",
    "buffer item": "self.count[0] = 5.0\nreturn x + self.count",
    "view of a buffer": "v = self.count.view(1, 4)\nv += 1\nreturn x + self.count",
    "buffer copied": "self.count.copy_(x[0])\nreturn x + self.count",
    "list": "ys = [x * 2]\nys += [x * 3]\nys[0].relu_()\nreturn ys",
    "dead end": "y = x * 2\ny.t().add_(1)\nreturn y",
    "statement without a use": "y = x * 2\nz = y + 1\ny.relu_()\nreturn z",
}  # fmt: skip


def _attributes() -> dict[str, object]:
    return {
        "relu": nn.ReLU(inplace=True),
        "mish": nn.Mish(inplace=True),
        "drop": nn.Dropout(0.5),
        "alpha": nn.AlphaDropout(0.5),
        "same": nn.Identity(),
        "count": nn.Buffer(torch.arange(4.0)),
    }


INPUT = (torch.linspace(-2, 3, 16).reshape(4, 4),)


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("name", SOURCES)
def test_results_and_effects_are_the_same(name: str, example: bool) -> None:
    if name.startswith("dtype") and not example:
        pytest.skip("needs an example to tell")
    holds(model(SOURCES[name], **_attributes()), INPUT, example=example)


@pytest.mark.parametrize("name", SOURCES)
def test_pickling_keeps_the_effects(name: str) -> None:
    made = unwrap(materialize(unwrap(trace(model(SOURCES[name], **_attributes()), INPUT))))
    again = pickle.loads(pickle.dumps(made))
    with torch.no_grad():
        assert same_bits(made(INPUT[0].clone()), again(INPUT[0].clone()))


def kinds(graph: Graph) -> list[str]:
    return [node.kind for node in graph]


@pytest.mark.parametrize(
    "line", ["y.relu_()", "F.relu(y, inplace=True)", "torch.relu_(y)", "self.relu(y)", "F.relu_(y)"]
)
def test_what_nobody_else_reads_becomes_out_of_place(line: str) -> None:
    graph = unwrap(trace(model(f"y = x * 2\n{line}\nreturn y", **_attributes())))
    assert kinds(graph) == ["placeholder", "mul", "relu", "output"]
    assert not any(node.aliased for node in graph)
    made = unwrap(materialize(graph))
    interpreter = torch.fx.Interpreter(made, garbage_collect_values=False)
    interpreter.run(INPUT[0])
    assert any((value < 0).any() for node, value in interpreter.env.items() if node.name == "mul")


@pytest.mark.parametrize("example", [True, False])
def test_a_shape_changed_in_place_becomes_out_of_place(example: bool) -> None:
    graph = unwrap(trace(model("y = x * 2\ny.unsqueeze_(0)\nreturn y"), INPUT if example else None))
    assert kinds(graph) == ["placeholder", "mul", "unsqueeze", "output"]


def test_what_is_kept_is_marked() -> None:
    graph = unwrap(trace(model(SOURCES["read before a write"])))
    marked = {node.id for node in graph if node.aliased}
    assert {"mul", "add", "t", "add_"} <= marked
    assert "relu" not in marked


def test_an_unknown_in_place_module_in_a_chain_disturbs_nobody() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.RReLU(inplace=True), nn.Conv2d(4, 2, 1)).eval()
    graph = unwrap(trace(net))
    assert kinds(graph)[1:-1] == ["conv2d", "batch_norm", "torch.nn.RReLU", "conv2d"]
    assert not any(node.aliased for node in graph)
    holds(net, (torch.randn(2, 3, 4, 4),))
