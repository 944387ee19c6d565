"""The host report, and the limits on weights that follow from it."""

import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qfunc.edge.host import check_host, pair_layout
from qfunc.edge.kernels.contract import Contract, Sample, check
from qfunc.edge.kernels.conv import ConvCall, OnednnConv
from qfunc.edge.kernels.quantized import QUANTIZED_CONV, QConvCall
from qfunc.edge.kernels.quantized_contracts import as_quantized
from qfunc.numerics.grid import Affine
from qfunc.numerics.saturation import largest_pair_sums, limit_pair_sums, pair_bound, saturating_channels

LAYOUTS = ("none", "channels", "flat", "any")
MAY_FAIL = {"onednn.qadd.tensor", "onednn.qmul.tensor"}


def test_every_kernel_that_qfunc_uses_keeps_its_contract_here():
    report = check_host()
    assert [v for v in report.verdicts if not v.ok and v.kernel not in MAY_FAIL] == []
    assert [v.kernel for v in report.verdicts] == sorted(v.kernel for v in report.verdicts)
    assert report.engines == ("onednn", "quantized")


def test_a_report_is_a_value():
    report = check_host()
    assert pickle.loads(pickle.dumps(report)) == report
    assert hash(report) == hash(pickle.loads(pickle.dumps(report)))
    assert report.saturates == (report.onednn_layout != "none")
    assert report.layout("unheard of") == "any"
    assert not report.verdict("unheard of").ok


def test_a_report_is_the_same_in_another_process_and_leaves_global_state():
    script = """
import torch, warnings
warnings.simplefilter("error")
from qfunc.edge.host import check_host
def state():
    return torch.backends.quantized.engine, torch.get_num_threads(), torch.is_grad_enabled(), list(warnings.filters)
rng, before = torch.random.get_rng_state(), state()
report = check_host()
assert torch.equal(rng, torch.random.get_rng_state()) and state() == before
print(repr(report))
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {repr(check_host()) + "\n"}


def test_a_kernel_that_raises_breaks_its_contract():
    def kernel(_):
        raise RuntimeError("no such luck")

    def samples():
        yield Sample("one", (torch.zeros(1),), None, Affine(1.0, 0))

    verdict = check(Contract("bad", kernel, lambda s: s.tensors[0], samples))
    assert (verdict.ok, verdict.reason) == (False, "one: no such luck")


def saturating_kernel(pairs_of):
    """A convolution and a linear layer that add the products of given pairs of positions in int16."""

    def rows(weight):
        flat = weight.flatten(1).double()
        total = torch.zeros(weight.shape[0], dtype=torch.float64)
        used = torch.zeros(flat.shape[1], dtype=torch.bool)
        for i, j in pairs_of(weight.shape[1], weight[0, 0].numel()):
            total += (255 * (flat[:, i] + flat[:, j])).clamp(-32768, 32767)
            used[[i, j]] = True
        return total + 255 * flat[:, ~used].sum(1)

    return (lambda x, w, g: rows(w)), (lambda x, w: rows(w))


def by_channel(channels, taps):
    return [(c * taps + t, (c + 1) * taps + t) for t in range(taps) for c in range(0, channels - 1, 2)]


def by_flat_order(channels, taps):
    order = [c * taps + t for t in range(taps) for c in range(channels)]
    return list(zip(order[0::2], order[1::2], strict=False))


def by_tap(channels, taps):
    return [(c * taps + t, c * taps + t + 1) for c in range(channels) for t in range(0, taps - 1, 2)]


@pytest.mark.parametrize(
    ("pairs_of", "layout"),
    [(lambda *_: [], "none"), (by_channel, "channels"), (by_flat_order, "flat"), (by_tap, "any")],
)
def test_the_probe_finds_the_layout_of_a_simulated_kernel(pairs_of, layout):
    assert pair_layout(*saturating_kernel(pairs_of)) == layout


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(LAYOUTS),
    st.sampled_from([(4, 3), (3, 5, 3), (8, 1, 3, 3), (2, 6, 2, 2), (1, 1)]),
    st.sampled_from([255, 200, 127]),
    st.integers(0, 2**31),
)
def test_limited_weights_are_safe_and_limiting_is_idempotent(layout, shape, quant_max, seed):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).abs().sqrt()
    scale = weight.abs().flatten(1).amax(1) / 127
    limited = limit_pair_sums(weight, scale, layout, quant_max_activation=quant_max)
    codes = (weight / limited.reshape(-1, *[1] * (len(shape) - 1))).round().clamp(-128, 127)
    assert not saturating_channels(codes, layout, quant_max).any()
    assert (limited >= scale).all()
    assert torch.equal(limit_pair_sums(weight, limited, layout, quant_max_activation=quant_max), limited)
    safe = ~saturating_channels((weight / scale.reshape(-1, *[1] * (len(shape) - 1))).round(), layout, quant_max)
    assert torch.equal(limited[safe], scale[safe])
    # No more is taken than a pair needs: two codes and a half step short of the bound at worst.
    if not safe.all():
        assert largest_pair_sums(codes, layout)[~safe].min() >= pair_bound(quant_max) - 3


REAL_LAYERS = [
    # in_channels, out_channels, kernel, groups, stride, size, batch
    (3, 64, 7, 1, 2, 224, 1), (64, 64, 3, 1, 1, 56, 1), (64, 256, 1, 1, 1, 56, 2), (256, 256, 3, 1, 2, 28, 1),
    (512, 2048, 1, 1, 1, 7, 4), (32, 32, 3, 32, 1, 112, 1), (144, 144, 3, 144, 2, 56, 1), (960, 960, 5, 960, 1, 7, 1),
    (256, 256, 3, 32, 1, 14, 1), (16, 1000, 1, 1, 1, 1, 8), (48, 48, 3, 6, 1, 28, 1), (33, 65, 3, 1, 1, 17, 3),
]  # fmt: skip


@pytest.mark.parametrize("engine", ["plain", *sorted(set(torch.backends.quantized.supported_engines) - {"none"})])
@pytest.mark.parametrize("layer", REAL_LAYERS, ids=str)
def test_limited_weights_never_saturate_layers_of_real_size(engine, layer):
    channels, outs, kernel, groups, stride, size, batch = layer
    report = check_host()
    layout = report.onednn_layout if engine == "plain" else dict(report.quantized_layouts)[engine]
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, (outs, 1, 1, 1), generator=generator) * 2 - 1
    real = torch.randn(outs, channels // groups, kernel, kernel, generator=generator).abs() * sign
    scale = limit_pair_sums(real, real.abs().flatten(1).amax(1) / 127, layout)
    weight = (real / scale[:, None, None, None]).round().clamp(-128, 127).to(torch.int8)
    geometry = ((stride,) * 2, (kernel // 2,) * 2, (1, 1), groups)
    shape, ones = (batch, channels, size, size), torch.ones(outs)
    for x in (
        torch.full(shape, 255, dtype=torch.uint8),
        torch.randint(0, 2, shape, generator=generator).mul(255).byte(),
    ):
        # Sums beyond 2**24 are not exact in float32.
        exact = torch.nn.functional.conv2d(x.double(), weight.double(), None, *geometry).float()
        if engine == "plain":
            module = OnednnConv(weight, ones, None, ConvCall(1.0, 0, 1.0, 0, "float32", *geometry))
            assert torch.equal(module(x), exact)
        else:
            step = exact.abs().max().item() / 120
            call = QConvCall(step, 128, *geometry)
            module = QUANTIZED_CONV[2](weight, ones, None, call, engine)
            codes = module(as_quantized(x, Affine(1.0, 0))).int_repr()
            assert (codes.double() - (exact.double() / step + 128)).abs().max() <= 1.5
