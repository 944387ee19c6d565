"""The programs run, on something tiny; what they measure is not looked at."""

from __future__ import annotations

import re
import tracemalloc

import pytest
import torch
from torch import nn

from qfunc import check_host, convert, fuse, lower, prepare, trace, unwrap
from qfunc.testing import oracle
from tests.benchmarks import calibration, imports, latency, passes, scaling, training

needs_oracle = pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")


@needs_oracle
def test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    passes.main(["--model", "squeezenet", "--repeats", "1", "--side", "12"])
    out = capsys.readouterr().out
    assert re.search(r"^ratio \(target 0\.10\)( +\d\.\d+){2}$", out, re.MULTILINE), out


def test_scaling(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main(["--sizes", "30", "60", "--repeats", "1"])
    out = capsys.readouterr().out
    assert all(re.search(rf"^{name}( +[\d.]+){{3}}$", out, re.MULTILINE) for name in scaling.PASSES), out


def test_latency(capsys: pytest.CaptureFixture[str]) -> None:
    latency.main(["--models", "squeezenet", "--batches", "1", "2", "--repeats", "1", "--calibration", "1"])
    out = capsys.readouterr().out
    assert len(re.findall(r"^squeezenet +(?:float|qfunc \w+|torch\.ao x86) +[12] ", out, re.MULTILINE)) >= 6, out


@needs_oracle
def test_training(capsys: pytest.CaptureFixture[str]) -> None:
    training.main(["--models", "squeezenet", "--batch", "2", "--repeats", "1"])
    out = capsys.readouterr().out
    line = r"^squeezenet +(?:float|qfunc \w+|torch\.ao x86) +[\d.]+ +[\d.]+$"
    assert len(re.findall(line, out, re.MULTILINE)) == 4, out


def test_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    calibration.main(["--smoke"])
    out = capsys.readouterr().out
    ways = ("float forward, fused", "MinMax", "Histogram", *(["torch.ao: Histogram"] if oracle.available() else ()))
    for way in ways:
        assert re.search(rf"^squeezenet +{way} +-?[\d.]+ +-?[\d.]+ +[\d.-]+$", out, re.MULTILINE), (way, out)
    assert len(re.findall(r"^squeezenet +MinMax +[12]( +-?[\d.]+){4}$", out, re.MULTILINE)) == 2, out
    assert re.search(r"^squeezenet +2( +[\d.]+){3} +0\.65$", out, re.MULTILINE), out


def test_a_peak_is_of_the_work_alone() -> None:
    before = calibration.peak(lambda: None)
    torch.ones(1 << 25).sum()  # 128 MB that are gone again
    assert calibration.peak(lambda: None) < before + 64
    assert calibration.peak(lambda: torch.ones(1 << 25).sum()) > before + 100
    with pytest.raises(RuntimeError, match="ended with"):
        calibration.peak(lambda: 1 / 0)


def test_a_stack_of_blocks_can_be_calibrated() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(calibration.Block(8, 2), calibration.Block(8, 2)).eval(), torch.randn(2, 5, 8)
    prepared = calibration.prepared_with(calibration.fused_graph(model, x), calibration.MinMax())
    assert len(prepared.measured) == 2 * 4, "what goes into the layers; three of them share it"
    calibration._calibrate(prepared, [x])


def test_imports(capsys: pytest.CaptureFixture[str]) -> None:
    imports.main(["--repeats", "1"])
    assert "processor" in capsys.readouterr().out


def test_import_loads_neither_the_compiler_nor_the_progress_bar() -> None:
    assert imports.loaded("torch._dynamo", "rich", "hypothesis", "safetensors") == ()


@pytest.mark.parametrize("size", [30, 100])
def test_a_chain_has_the_size_asked_for(size: int) -> None:
    assert size - 7 < len(scaling.chain(size)) <= size


def _heavy(layers: int, channels: int) -> nn.Module:
    """1x1 convolutions whose weights no memory stands behind: untouched pages of `torch.empty`."""
    blocks = [(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(channels), nn.ReLU()) for _ in range(layers)]
    for conv, _, _ in blocks:
        conv.weight = nn.Parameter(torch.empty(channels, channels, 1, 1))
        conv.bias = nn.Parameter(torch.zeros(channels))
    return nn.Sequential(*(module for block in blocks for module in block)).eval()


def test_passes_never_copy_weights() -> None:
    model = _heavy(layers=4, channels=8192)
    assert sum(parameter.nbytes for parameter in model.parameters()) > 1 << 30
    graph, host = unwrap(trace(model)), check_host()
    with torch.profiler.profile(profile_memory=True) as profile:
        tracemalloc.start()
        try:
            fused = unwrap(fuse(graph))
            converted = unwrap(convert(scaling.calibrated(unwrap(prepare(fused, scaling.MAPPING)))))
            lowered = unwrap(lower(converted, host=host))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert len(fused) == 6, "input, four convolutions with all that follows them, output"
    assert lowered.certificate.in_int8 == 4
    tensors = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert peak + tensors < 10 << 20
