"""What the reference form and the kernels compute is what torch.ao's compute: value by value, and at the outputs."""

from dataclasses import replace

import pytest
import torch
from torch import fx

from qfunc import check_host, lower, materialize, unwrap
from qfunc.numerics.saturation import UNPAIRED
from qfunc.testing import oracle, sqnr
from tests.parity.sides import CASES, outputs, zoo_sides

pytestmark = [
    pytest.mark.skipif(not oracle.available(), reason="needs torch.ao"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation.*:UserWarning"),
]

COMPARED = [case for case in CASES if case.name not in ("transformer", "transformer_leaf", "sizes")]
"""The cases in which the same values are quantized: see `test_sites`."""

RESIZABLE = ("resnet", "densenet", "inception", "mobilenet")
SATURATES = check_host().saturates


class Recorded(fx.Interpreter):
    """Keeps every value; with `forced`, goes on with those values instead of its own."""

    def __init__(self, module, forced=None):
        super().__init__(module)
        self.values, self.forced = {}, forced or {}

    def run_node(self, n):
        self.values[n.name] = value = super().run_node(n)
        forced = self.forced.get(n.name)
        return value if forced is None or forced.is_quantized != value.is_quantized else forced


def codes(value):
    return value.int_repr() if value.is_quantized else value


def steps(ours, theirs):
    return int((codes(ours).int() - codes(theirs).int()).abs().max())


@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_reference_form(case):
    """Each quantized value, computed here from torch.ao's quantized values before it, is within one step of torch.ao's.

    Without that, values that lie half-way between two steps, and a step that a weight folded in float32 takes, would
    add up from layer to layer on both sides. See `qfunc.numerics.affine` for the half-way ones.
    """
    sides = zoo_sides(case)
    reference, batch = sides.reference(), sides.batches[0]
    theirs = oracle.reference(sides.theirs)
    recorded = Recorded(theirs)
    with torch.no_grad():
        recorded.run(*batch)
    named = {
        n.args[0].name: recorded.values[n.name] for n in theirs.graph.nodes if n.target is torch.quantize_per_tensor
    }
    wanted = {n.id: named[_value(sides, n)] for n in sides.converted.graph if n.kind == "quantize"}
    ours = Recorded(reference, {id: codes(value) for id, value in wanted.items()})
    with torch.no_grad():
        ours.run(*batch)
    assert len(wanted) == len(named)
    for id, value in wanted.items():
        assert steps(ours.values[id], value) <= 1, id
        assert (codes(ours.values[id]) != codes(value)).float().mean() < 0.1, id


def _value(sides, node):
    return sides.their_name(next(node.uses()))


# in "shared", torch.ao gives one module the qparams of its last site: see `test_flaws`
@pytest.mark.parametrize("case", [case for case in COMPARED if case.name != "shared"], ids=str)
def test_lowered_to_quantized_kernels(case):
    """The same kernel calls, on a host said not to saturate, so that no weight is limited: torch.ao limits none."""
    sides = zoo_sides(case)
    batch = sides.batches[0]
    host = check_host()
    unlimited = replace(host, quantized_layouts=tuple((engine, UNPAIRED) for engine, _ in host.quantized_layouts))
    lowered = unwrap(lower(sides.converted, engine="quantized", host=unlimited))
    theirs = Recorded(oracle.convert(sides.theirs))
    with torch.no_grad():
        theirs.run(*batch)
    quantized = {name: v for name, v in theirs.values.items() if isinstance(v, torch.Tensor) and v.is_quantized}
    names = {node.id: sides.their_name(node.id) for node in lowered.graph if node.id in sides.fused.nodes}
    wanted = {id: quantized[name] for id, name in names.items() if name in quantized}
    ours = Recorded(unwrap(materialize(lowered)), wanted)
    with torch.no_grad():
        ours.run(*batch)
    compared = [id for id in wanted if ours.values[id].is_quantized]
    assert len(compared) >= 4
    for id in compared:
        assert steps(ours.values[id], wanted[id]) <= 1, id


@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_noise_of_outputs(case):
    """On more data than was calibrated. Weights that are limited against overflow cost some signal, on some hosts."""
    sides = zoo_sides(case)
    batches = case.batches(3, 256)[1:]
    expected = outputs(sides.model, batches)
    theirs = sqnr(expected, outputs(oracle.convert(sides.theirs), batches))
    assert sqnr(expected, outputs(sides.reference(), batches)) >= theirs - 0.2
    for engine in ("onednn", "quantized"):
        assert sqnr(expected, outputs(sides.lowered(engine), batches)) >= theirs - (0.6 if SATURATES else 0.2), engine


@pytest.mark.parametrize("engine", ["onednn", "quantized"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("resnet", "densenet", "inception", "mobilenet")], ids=str
)
def test_other_sizes(case, engine):
    """Nothing of the calibrated size, nor of sizes seen before, is left in a lowered model."""
    sides = zoo_sides(case)
    reference, lowered = sides.reference(), sides.lowered(engine)
    generator = torch.Generator().manual_seed(0)
    for batch, grow in ((1, 0), (5, 4), (3, 2), (1, 0)):
        shape = sides.batches[0][0].shape
        x = torch.randn(batch, shape[1], *(size + grow for size in shape[2:]), generator=generator)
        with torch.no_grad():
            expected, actual, fresh = reference(x), lowered(x), sides.lowered(engine)(x)
        assert torch.equal(actual, fresh)
        # one image, seven bits, and limited weights on some hosts
        assert sqnr(expected, actual) > 12
