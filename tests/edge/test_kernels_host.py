"""The host report, and the limits on weights that follow from it."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qfunc
from qfunc.edge.host import check_host, pair_layouts
from qfunc.edge.kernels.contract import Contract, Sample, check
from qfunc.edge.kernels.conv import ConvCall, OnednnConv
from qfunc.edge.kernels.quantized import QUANTIZED_CONV, QConvCall
from qfunc.edge.kernels.quantized_contracts import as_quantized, quantized_contracts
from qfunc.numerics.grid import Affine
from qfunc.numerics.saturation import (
    UNPAIRED,
    PairLayouts,
    largest_pair_sums,
    limit_pair_sums,
    pair_bound,
    saturating_channels,
)
from qfunc.testing.kernel_law import kernels_off

CONV = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}
LAYOUTS = ("none", "channels", "flat", "any")
MAY_FAIL = {
    "onednn.qadd.tensor",
    "onednn.qmul.tensor",
    # what torch's engines have no kernel for, or a wrong one: `lower` takes another way
    *(f"quantized.conv_transpose{rank}d[{engine}]" for rank in (1, 2, 3) for engine in ("onednn", "x86")),
    *(f"quantized.{kernel}[qnnpack]" for kernel in ("avg_pool1d", "avg_pool2d", "clamp", "max_pool3d")),
    *(f"quantized.linear_float16[{engine}]" for engine in ("onednn", "qnnpack")),
}


def test_every_kernel_that_qfunc_uses_keeps_its_contract_here():
    report = check_host()
    assert [v for v in report.verdicts if not v.ok and v.kernel not in MAY_FAIL] == []
    assert [v.kernel for v in report.verdicts] == sorted(v.kernel for v in report.verdicts)
    assert report.engines == ("onednn", "quantized", "decomposed")


def test_a_report_is_a_value():
    report = check_host()
    assert pickle.loads(pickle.dumps(report)) == report
    assert hash(report) == hash(pickle.loads(pickle.dumps(report)))
    assert report.saturates == (report.onednn_layouts != UNPAIRED)
    assert report.layouts("unheard of") == PairLayouts("any", "any")
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
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "."},
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


def saturating_kernel(pairs_of, depthwise=None):
    """A convolution and a linear layer that add the products of given pairs of positions in int16.

    `depthwise` gives the pairs of a padded depthwise convolution of more than 100 groups, where they are others.
    """

    def sums(run, weight, pairs):
        flat = weight.flatten(1).double()
        rest, total = flat.clone(), 0.0
        for pair in pairs:
            part = torch.zeros_like(flat)
            part[:, list(pair)] = flat[:, list(pair)]
            rest[:, list(pair)] = 0
            if part.any():
                total = total + run(part.reshape(weight.shape)).clamp(-32768, 32767)
        return total + run(rest.reshape(weight.shape))

    def conv(x, weight, groups, padding):
        own = depthwise is not None and weight.shape[1] == 1 and groups > 100 and padding
        pairs = (depthwise if own else pairs_of)(weight.shape[1], weight[0, 0].numel())
        return sums(lambda w: CONV[x.dim() - 2](x.double(), w, None, 1, padding, 1, groups), weight, pairs)

    def linear(x, weight):
        return sums(lambda w: torch.nn.functional.linear(x.double(), w), weight, pairs_of(weight.shape[1], 1))

    return conv, linear


def by_channel(channels, taps):
    return [(c * taps + t, (c + 1) * taps + t) for t in range(taps) for c in range(0, channels - 1, 2)]


def by_flat_order(channels, taps):
    order = [c * taps + t for t in range(taps) for c in range(channels)]
    return list(zip(order[0::2], order[1::2], strict=False))


def by_tap(channels, taps):
    return [(c * taps + t, c * taps + t + 1) for c in range(channels) for t in range(0, taps - 1, 2)]


def nowhere(*_):
    return []


def by_distance(_, taps):
    return [(t, t + 2) for t in range(0, taps - 2, 4)]


@pytest.mark.parametrize(
    ("kernel", "layouts"),
    [
        ((nowhere,), ("none", "none")),
        ((by_channel,), ("channels", "none")),  # one channel per group has no neighbour
        ((by_flat_order,), ("flat", "flat")),
        ((by_tap,), ("any", "flat")),
        ((nowhere, by_flat_order), ("none", "flat")),
        ((by_channel, by_flat_order), ("channels", "flat")),
        ((nowhere, by_distance), ("none", "any")),
    ],
)
def test_the_probe_finds_the_layouts_of_a_simulated_kernel(kernel, layouts):
    assert pair_layouts(*saturating_kernel(*kernel)) == PairLayouts(*layouts)


def test_a_kind_that_a_kernel_refuses_is_unknown():
    conv, linear = saturating_kernel(nowhere)

    def dense(x, weight, groups, padding):
        if groups > 1:
            raise RuntimeError("no groups")
        return conv(x, weight, groups, padding)

    assert pair_layouts(dense, linear) == PairLayouts("none", "any")


def test_a_depthwise_kernel_keeps_its_contract_without_limits_exactly_where_the_probe_says_so():
    """Not fbgemm's, on any x86 CPU: torch's x86 engine has it, too, for some numbers of channels."""
    report = check_host()
    for engine, layouts in report.quantized_layouts:
        unlimited = replace(layouts, depthwise="none")
        contracts = {contract.name: contract for contract in quantized_contracts(((engine, unlimited),))}
        for kernel in (f"quantized.conv{dims}d[{engine}]" for dims in (2, 3)):
            verdict = check(contracts[kernel])
            assert verdict.ok == (layouts.depthwise == "none"), verdict
            assert report.verdict(kernel).ok


def test_only_depthwise_weights_are_limited_where_only_their_kernels_saturate():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(104, 104, 3, padding=1, groups=104),
        torch.nn.Conv2d(104, 8, 1),
        torch.nn.Conv2d(8, 8, 3, padding=1, groups=4),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 36, 4),
        torch.nn.Linear(4, 4),  # read in float, which this engine does not write
    ).eval()
    torch.nn.init.constant_(net[0].weight, 0.1)
    x = torch.rand(2, 104, 6, 6).sqrt()
    report = check_host()
    host = replace(
        report,
        quantized_layouts=tuple((engine, PairLayouts("none", "flat")) for engine in report.quantized_engines),
    )
    prepared = qfunc.unwrap(qfunc.prepare(qfunc.unwrap(qfunc.trace(net, (x,)))))
    converted = qfunc.unwrap(qfunc.convert(qfunc.unwrap(qfunc.calibrate(prepared, [(x,)]))))
    lowered = qfunc.unwrap(qfunc.lower(converted, engine="quantized", host=host))
    weights = [
        node.get("weight") for node in lowered.graph if node.kind.startswith("quantized.") and node.has("weight")
    ]
    assert [weight.pairs for weight in weights] == ["flat", "none", "none", "none"]
    assert lowered.certificate.limited
    # And on this host, as it is: every kernel gives what its operator means.
    here = qfunc.unwrap(qfunc.lower(converted, engine="quantized"))
    assert len([entry for entry in here.certificate.entries if entry.kernel]) >= 4
    assert [off for off in kernels_off(converted, here, [(x,)]) if off] == []


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
    layouts = report.onednn_layouts if engine == "plain" else dict(report.quantized_layouts)[engine]
    layout = layouts.of((outs, channels // groups, kernel, kernel), groups)
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
