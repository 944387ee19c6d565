"""Sites of input-weight equalization: the values that layers read, channel by channel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import nn

from qfunc import CPU, X86, QConfigMapping, calibrate, describe, fuse, layers, prepare, trace, unwrap
from qfunc.errors import BadConfig, UnknownName, UserFunctionFailed
from qfunc.ir import users
from qfunc.testing import oracle
from tests.parity.sides import CASES

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Branches(nn.Module):
    """Two convolutions read one value, which a sum reads as well."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(192, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(torch.flatten(F.relu(self.left(x)) + F.relu(self.right(x)) + x, 1))


def graph_of(model, inputs=X, backend=CPU):
    return unwrap(fuse(unwrap(trace(model.eval(), inputs)), backend=backend))


def test_branches_have_one_site_and_other_uses_none():
    prepared = unwrap(prepare(graph_of(Branches(), backend=X86), backend=X86, equalize=layers))
    found = {e.site.taps[0]: (e.site.observer.spec.ch_axis, {edge.user for edge in e.edges})
             for e in prepared.equalizations.values()}  # fmt: skip
    assert found == {"x": (1, {"relu"}), "relu": (1, {"relu_1", "relu_2"}), "flatten": (1, {"head"})}
    text = str(unwrap(describe(prepared)))
    assert "relu       1         relu_1, relu_2" in text


def test_calibration_measures_the_channels():
    prepared = unwrap(prepare(graph_of(Branches()), equalize=layers))
    calibrated = unwrap(calibrate(prepared, [X], progress=False))
    (site,) = (e.site for e in prepared.equalizations.values() if e.site.taps == ("x",))
    state = calibrated.statistics.state(site.folds)
    assert torch.equal(state.minimum, X.amin((0, 2, 3)))
    assert torch.equal(state.maximum, X.amax((0, 2, 3)))


def test_the_channels_of_a_linear_layer_are_its_last_axis():
    prepared = unwrap(prepare(graph_of(nn.Sequential(nn.Linear(8, 4))), equalize=layers))
    assert [e.site.observer.spec.ch_axis for e in prepared.equalizations.values()] == [3]
    unknown = unwrap(prepare(unwrap(trace(nn.Sequential(nn.Linear(8, 4)).eval())), equalize=layers))
    assert not unknown.equalizations
    assert "trace with example_inputs" in str(unknown.notes[0])


class Named(nn.Module):
    """Layers whose values have the names that sites of equalization have, too."""

    def __init__(self) -> None:
        super().__init__()
        self.x_equalization, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.x_equalization(x))


def test_sites_have_names_of_their_own():
    prepared = unwrap(prepare(graph_of(Named()), equalize=layers))
    assert "x_equalization" in prepared.sites
    assert not prepared.sites.keys() & prepared.equalizations.keys()
    assert len(prepared.measured) == len(prepared.sites) + len(prepared.equalizations)


def test_what_cannot_be_equalized_is_told():
    graph = graph_of(Branches())
    mapping = CPU.qconfig_mapping.set_module_name("left", None)
    prepared = unwrap(prepare(graph, mapping, equalize=lambda graph: (*layers(graph), "flatten")))
    told = {note.node: note.text for note in prepared.notes}
    assert "not both quantized" in told["left"]
    assert "it is a flatten" in told["flatten"]
    assert not unwrap(prepare(graph, QConfigMapping(), equalize=layers)).equalizations
    assert isinstance(prepare(graph, equalize=lambda _: ["none"]).failure(), UnknownName)
    assert isinstance(prepare(graph, equalize=lambda _: 1 // 0).failure(), UserFunctionFailed)
    assert isinstance(prepare(graph, equalize="layers").failure(), BadConfig)


@pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")
@pytest.mark.parametrize("case", [c for c in CASES if "transformer" not in c.name], ids=str)
def test_the_reference_equalizes_the_same_layers_where_values_do_not_branch(case):
    model, inputs = case.build()
    graph = graph_of(model, inputs, X86)
    prepared = unwrap(prepare(graph, backend=X86, equalize=layers))
    read = users(graph)
    ours = {graph[edge.user].origin.module: len(read[e.site.taps[0]]) > 1
            for e in prepared.equalizations.values() for edge in e.edges}  # fmt: skip
    theirs = oracle.equalized_layers(model, inputs)
    assert {layer for layer, branched in ours.items() if not branched} <= theirs <= set(ours)
