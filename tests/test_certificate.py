"""The certificate: what it says of each operator, its totals, its JSON, and what changed between two."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from returns.result import Success
from torch import Tensor, nn

import qfunc
from qfunc import (
    CPU,
    X86,
    Certificate,
    HostReport,
    Verdict,
    check_host,
    lower,
    materialize,
    quantize,
    read_certificate,
    read_host_report,
    render,
    to_json,
    unwrap,
)
from qfunc.errors import BadConfig, EngineMissing, NotLowered, UnknownName, problems
from qfunc.ir import digest
from qfunc.passes.stages import Converted

BATCH = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Everything(nn.Module):
    """All four forms: kernels on integers, moved codes, an island, a float head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.wide = nn.Linear(128, 6)
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(self.pool(torch.relu(self.conv(x))).flatten(1))
        return torch.softmax(self.fc(self.norm(y)), 1)


def converted(model: nn.Module | None = None, example: Any = BATCH, **options: Any) -> Converted:
    torch.manual_seed(0)
    graph = unwrap(qfunc.trace((model or Everything()).eval(), example))
    prepared = unwrap(qfunc.fuse(graph).bind(lambda fused: qfunc.prepare(fused, **options)))
    return unwrap(qfunc.calibrate(prepared, [BATCH]).bind(qfunc.convert))


@pytest.fixture(scope="module")
def reference() -> Converted:
    return converted()


@pytest.fixture(scope="module")
def right() -> HostReport:
    """A machine with VNNI whose every kernel is right."""
    host = check_host()
    return replace(host, verdicts=tuple(Verdict(v.kernel, ok=True) for v in host.verdicts))


def broken(host: HostReport, *names: str) -> HostReport:
    assert set(names) <= {v.kernel for v in host.verdicts}
    return replace(
        host, verdicts=tuple(Verdict(v.kernel, False, "off by 3") if v.kernel in names else v for v in host.verdicts)
    )


def certificate(stage: Converted, host: HostReport, **options: Any) -> Certificate:
    return unwrap(lower(stage, host=host, **options)).certificate


def of(certificate: Certificate, node: str) -> Any:
    return next(entry for entry in certificate.entries if entry.node == node)


def test_every_operator_is_told_with_its_form_dtypes_and_contracts(reference: Converted, right: HostReport) -> None:
    found = certificate(reference, right)
    rows = [(e.node, e.form, e.kernel, e.engine, e.inputs, e.weight, e.output, e.verdict) for e in found.entries]
    assert rows == [
        ("relu", "integer", "onednn.conv2d", "onednn", ("uint8",), "int8", "uint8", "keeps onednn.conv2d"),
        ("pool", "integer", "codes.max_pool2d", "aten", ("uint8",), "", "uint8", "keeps max_pool2d"),
        ("flatten", "moves", "aten", "aten", ("uint8",), "", "uint8", "exact by construction"),
        ("wide", "integer", "onednn.linear", "onednn", ("uint8",), "int8", "float32", "keeps onednn.linear"),
        ("norm", "island", "float island", "aten", ("float32",), "float32", "uint8", "exact by construction"),
        ("fc", "integer", "onednn.linear", "onednn", ("uint8",), "int8", "float32", "keeps onednn.linear"),
        ("softmax", "float", "", "aten", ("float32",), "", "float32", ""),
    ]
    assert (found.total, found.in_int8, found.islands) == (7, 5, 1)


def test_the_wide_table_has_all_that_the_short_one_has(reference: Converted, right: HostReport) -> None:
    found = certificate(reference, right)
    short, wide = str(found).splitlines(), found.table(wide=True).splitlines()
    assert wide[0] == short[0]
    for entry in found.entries:
        (row,) = (line for line in wide if line.startswith(f"{entry.node} "))
        for part in (entry.kernel, entry.output, entry.reason, entry.verdict, f"{entry.multiply_adds:,}"):
            assert part in row


def test_a_certificate_and_a_report_survive_json(reference: Converted, right: HostReport) -> None:
    for host in (right, check_host(), broken(right, "onednn.conv2d", "table")):
        assert unwrap(read_host_report(unwrap(to_json(host)))) == host
        found = certificate(reference, host)
        again = unwrap(read_certificate(unwrap(to_json(found))))
        assert again == found
        assert again.notes == found.notes
        assert str(again) == str(found)
        assert not found.diff(again)
        assert unwrap(to_json(again)) == unwrap(to_json(found))


def test_lowering_with_a_report_that_was_read_gives_the_same_graph(reference: Converted) -> None:
    host = check_host()
    again = unwrap(read_host_report(unwrap(to_json(host))))
    assert digest(unwrap(lower(reference, host=again)).graph) == digest(unwrap(lower(reference, host=host)).graph)


UNTRUSTED = {
    "no JSON": ("{", "no JSON"),
    "another document": (unwrap(to_json(CPU.qconfig_mapping)), "expected a"),
    "a form that is none": ('"form": "integer"', '"form": "magic"'),
    "a count that is text": ('"conversions": 1', '"conversions": "1"'),
    "an unknown field": ('"conversions": 1', '"conversions": 1, "conversion": 1'),
    "a missing field": ('"limited": false,', ""),
}


@pytest.mark.parametrize("name", list(UNTRUSTED)[:2])
def test_texts_that_are_no_certificate_are_refused(name: str) -> None:
    text, reason = UNTRUSTED[name]
    for read in (read_certificate, read_host_report):
        problem = read(text).failure()
        assert isinstance(problem, BadConfig)
        assert reason in problem.reason


@pytest.mark.parametrize("name", list(UNTRUSTED)[2:5])
def test_damaged_certificates_are_refused(name: str, reference: Converted, right: HostReport) -> None:
    text = unwrap(to_json(replace(certificate(reference, right), conversions=1)))
    old, new = UNTRUSTED[name]
    assert old in text
    assert all(isinstance(p, BadConfig) for p in problems(read_certificate(text.replace(old, new, 1)).failure()))


@pytest.mark.parametrize("value", [None, 3, b"{}"])
def test_what_is_no_text_is_refused(value: Any) -> None:
    assert isinstance(read_certificate(value).failure(), BadConfig)
    assert isinstance(read_host_report(value).failure(), BadConfig)


def test_a_report_with_a_layout_that_is_none_is_refused() -> None:
    found = json.loads(unwrap(to_json(check_host())))
    found["onednn_layouts"]["dense"] = "diagonal"
    problem = read_host_report(json.dumps(found)).failure()
    assert isinstance(problem, BadConfig)
    assert problem.node == "onednn_layouts.dense"
    assert "'none'" in problem.reason


# What changed ---------------------------------------------------------------------------------------------------------


def test_equal_certificates_do_not_differ(reference: Converted, right: HostReport) -> None:
    found = certificate(reference, right)
    assert not found.diff(found)
    assert str(found.diff(found)) == "no difference"


def test_a_kernel_that_is_lost_on_another_host_is_told(reference: Converted, right: HostReport) -> None:
    before, after = certificate(reference, right), certificate(reference, broken(right, "onednn.conv2d"))
    found = before.diff(after)
    assert found
    assert (found.lost, found.gained) == (("relu",), ())
    assert (after.diff(before).lost, after.diff(before).gained) == ((), ("relu",))
    told = {(c.node, c.what): (c.before, c.after) for c in found.changes}
    assert told["relu", "kernel"] == ("onednn.conv2d", "")
    assert told["relu", "reason"][1] == "onednn.conv2d: fails its contract: off by 3"
    assert told["", "in_int8"] == ("5", "4")
    assert {node for node, _ in told} == {"", "relu"}
    assert str(found).splitlines()[0].split() == ["node", "module", "what", "before", "after"]


def test_a_kernel_that_becomes_an_island_is_lost(reference: Converted, right: HostReport) -> None:
    after = certificate(reference, broken(right, "max_pool2d"))
    assert certificate(reference, right).diff(after).lost == ("pool",)
    assert of(after, "pool").form == "island"


def test_engines_and_configurations_are_compared(reference: Converted, right: HostReport) -> None:
    before = certificate(reference, right)
    onto_float = before.diff(certificate(reference, right, engine="reference"))
    assert {"fc", "relu"} <= set(onto_float.lost)
    assert ("", "engine") in {(c.node, c.what) for c in onto_float.changes}
    mapping = CPU.qconfig_mapping.set_module_name("fc", None)
    other = certificate(converted(qconfig_mapping=mapping), right)
    assert "fc" in before.diff(other).lost


def test_operators_that_only_one_has_are_told_and_not_lost(reference: Converted, right: HostReport) -> None:
    before = certificate(reference, right)
    after = replace(before, entries=before.entries[1:])
    (gone,) = (c for c in before.diff(after).changes if c.node)
    assert (gone.node, gone.what, gone.after) == ("relu", "operator", "")
    assert not before.diff(after).lost


# Kernels that fail their contracts, and strict ------------------------------------------------------------------------


class Plain(nn.Module):
    """All of it on integers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.conv(x)))


def strictly(stage: Converted, host: HostReport) -> Any:
    return lower(stage, host=host, strict=True)


def test_strict_bears_islands_and_refuses_what_stays_float(reference: Converted, right: HostReport) -> None:
    """The island of `norm`, and `softmax`, which was never meant to be int8, are no fallbacks; a float layer is."""
    assert isinstance(strictly(reference, right), Success)
    problem = strictly(reference, broken(right, "onednn.conv2d")).failure()
    assert problem == NotLowered("conv", "onednn.conv2d: fails its contract: off by 3")
    fallbacks = certificate(reference, broken(right, "onednn.conv2d")).fallbacks
    assert [entry.node for entry in fallbacks] == ["relu"]


def test_a_broken_kernel_with_a_replacement_is_a_failure_only_when_strict(right: HostReport) -> None:
    stage = converted(Plain())
    host = broken(right, "table")
    lowered = unwrap(lower(stage, host=host))
    entry = of(lowered.certificate, "sigmoid")
    assert (entry.form, entry.broken) == ("island", (Verdict("table", False, "off by 3"),))
    assert entry.reason == "table: fails its contract: off by 3"
    assert not lowered.certificate.fallbacks
    assert lowered.certificate.refused == (entry,)
    assert strictly(stage, host).failure() == NotLowered("sigmoid", entry.reason)
    kernels, floats = (unwrap(materialize(s))(BATCH) for s in (lowered, stage))
    assert (kernels - floats).abs().max() < 0.05
    assert isinstance(strictly(stage, right), Success)


def test_strict_tells_all_at_once(right: HostReport) -> None:
    found = strictly(converted(Plain()), broken(right, "table", "onednn.conv2d")).failure()
    assert [type(p).__name__ for p in problems(found)] == ["NotLowered"] * 3
    assert [p.node for p in problems(found)] == ["conv", "sigmoid", "head"]


def test_a_kernel_that_declines_for_another_reason_does_not_count_as_broken(right: HostReport) -> None:
    """A sum read in float has no kernel, broken or not."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * torch.sigmoid(self.conv(x))

    stage = converted(Sum())
    for entry in certificate(stage, broken(right, "mul")).entries:
        assert not entry.broken or entry.form == "island"


# Totals ---------------------------------------------------------------------------------------------------------------


def test_totals_of_a_model_that_was_traced_without_example_are_unknown_and_said_so(right: HostReport) -> None:
    found = certificate(converted(example=None), right)
    assert found.multiply_adds is None
    assert found.int8_share is None
    (note,) = (note for note in found.notes if "multiply-adds" in note.text)
    assert note.node == next(e.node for e in found.entries if e.multiply_adds is None)
    assert "unknown" in found.table(wide=True)


def test_totals(reference: Converted, right: HostReport) -> None:
    found = certificate(reference, right)
    conv, fc = 2 * 8 * 8 * 8 * 27, 2 * 128 * 6 + 2 * 6 * 5
    assert found.multiply_adds == conv + fc
    assert found.int8_share == 1
    assert certificate(reference, broken(right, "onednn.conv2d")).int8_share == fc / (conv + fc)
    assert certificate(reference, right, engine="reference").int8_share == 0
    norm, weights, channels = 2 * 6 * 4, 8 * 27 + 128 * 6 + 6 * 5, 8 + 6 + 5
    assert found.float_weight_bytes == 4 * (weights + channels) + norm
    assert found.weight_bytes == weights + 2 * 4 * channels + norm  # a scale and a bias for each channel
    graph = unwrap(lower(reference, host=right)).graph
    assert found.conversions == sum(node.kind in ("quantize", "dequantize") for node in graph)
    assert found.requantizations == sum(node.kind == "requantize" for node in graph)


# Engine auto ----------------------------------------------------------------------------------------------------------

ENGINE_OF = {
    "all is well": ((), "onednn"),
    "no convolution of oneDNN": (("onednn.conv2d",), "quantized"),
    "no linear layer of oneDNN": (("onednn.linear",), "quantized"),
    "of oneDNN something else": (("onednn.conv3d", "table"), "onednn"),
    "no layers at all": (("onednn.conv2d", "quantized.linear[{}]"), "reference"),
}


@pytest.mark.parametrize("name", ENGINE_OF)
def test_auto_is_the_best_engine_that_keeps_its_contracts(name: str, reference: Converted, right: HostReport) -> None:
    names, expected = ENGINE_OF[name]
    best = next(e for e in ("x86", "fbgemm", "onednn", "qnnpack") if e in right.quantized_engines)
    host = broken(right, *(name.format(best) for name in names))
    lowered = unwrap(lower(reference, host=host, engine="auto"))
    assert (lowered.engine, lowered.certificate.engine) == (expected, expected)
    assert digest(lowered.graph) == digest(unwrap(lower(reference, host=host, engine=expected)).graph)
    (note,) = (note for note in lowered.certificate.notes if note.node == "engine")
    assert note.text.startswith(f"auto is {expected}")
    assert all(v in note.text for v in (name.format(best) for name in names[:1]) if expected != "onednn")
    assert unwrap(materialize(lowered))(BATCH).shape == (2, 5)


def test_auto_without_any_engine_is_the_reference(reference: Converted, right: HostReport) -> None:
    bare = replace(right, engines=(), quantized_engines=())
    assert unwrap(lower(reference, host=bare, engine="auto")).engine == "reference"
    claiming = replace(bare, engines=("quantized", "gpu"))
    assert unwrap(lower(reference, host=claiming, engine="auto")).engine == "reference"
    for host, engine in ((bare, "onednn"), (claiming, "quantized")):
        problem = lower(reference, host=host, engine=engine).failure()
        assert isinstance(problem, EngineMissing)
        assert problem.available == ("reference",)


def test_an_unknown_engine_is_told_with_those_that_run_here(reference: Converted, right: HostReport) -> None:
    problem = lower(reference, host=right, engine="onedn").failure()
    assert isinstance(problem, UnknownName)
    assert "onednn" in render(problem)
    bare = replace(right, engines=())
    assert "reference" in render(lower(reference, host=bare, engine="gpu").failure())


def test_quantize_takes_the_backend_that_suits_the_engine_that_auto_is(right: HostReport) -> None:
    model = Plain().eval()
    for host, backend in ((right, CPU), (broken(right, "onednn.conv2d"), X86)):
        auto = unwrap(quantize(model, [BATCH], engine="auto", host=host))
        named = unwrap(quantize(model, [BATCH], engine=auto.engine, host=host, backend=backend))
        assert digest(auto.graph) == digest(named.graph)
