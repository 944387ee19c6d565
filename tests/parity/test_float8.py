"""Casts to small floats that a backend allows run; torch.ao prepares them, and converts none but float16."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from qfunc import X86, Cast, QConfig, QConfigMapping, convert, materialize, prepare, quantize, trace, unwrap
from qfunc.config.backend_config import Observation, OperatorConfig
from qfunc.config.dtype_config import DTypeConfig
from qfunc.edge.calibrate import calibrate
from qfunc.testing import oracle

SMALL = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
FLOAT8 = SMALL[2:]
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) * 3


def backend_of(dtype: str) -> Any:
    """One that has linear layers, activations and weights in that dtype, dynamic as well."""
    static = DTypeConfig(dtype, dtype, dtype, dtype)
    dynamic = DTypeConfig(dtype, "float32", dtype, "float32", is_dynamic=True)
    linear = OperatorConfig(("linear",), Observation.OWN, (static, dynamic))
    return replace(X86, operators=(linear,))


def layer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5)).eval()


def small(x: torch.Tensor, dtype: str) -> torch.Tensor:
    return x.to(getattr(torch, dtype)).float()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", SMALL)
def test_a_configured_cast_is_prepared_converted_and_run(dtype, dynamic):
    model = layer()
    how = QConfig(Cast(dtype, dynamic=dynamic), Cast(dtype))
    prepared = unwrap(prepare(unwrap(trace(model)), QConfigMapping(how), backend=backend_of(dtype)))
    converted = unwrap(convert(unwrap(calibrate(prepared, [(X,)]))))
    found = unwrap(materialize(converted))(X)
    bias = model[0].bias if dynamic else small(model[0].bias, dtype)
    expected = F.linear(small(X, dtype), small(model[0].weight, dtype), bias)
    expected = expected if dynamic else small(expected, dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(found, model(X))


@pytest.mark.parametrize("dtype", FLOAT8)
def test_in_one_call(dtype):
    model = layer()
    how = QConfigMapping(QConfig(Cast(dtype), Cast(dtype)))
    quantized = unwrap(quantize(model, [(X,)], qconfig_mapping=how, backend=backend_of(dtype)))
    found = unwrap(materialize(quantized))(X)
    assert torch.equal(found, small(found, dtype))
    assert (found - model(X)).abs().max() < 0.5 * model(X).abs().max()


@pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")
@pytest.mark.parametrize("dtype", ["float16", *FLOAT8])
def test_torch_ao_prepares_them_and_converts_float16_alone(dtype):
    pytest.importorskip("torch.ao.quantization.quantize_fx")  # before it, the tables fail to import
    tables: Any = pytest.importorskip("torch.ao.quantization.backend_config")
    ao: Any = pytest.importorskip("torch.ao.quantization")
    given = getattr(torch, dtype)
    kind = tables.ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT
    row = tables.BackendPatternConfig(nn.ReLU).set_observation_type(kind)
    row = row.add_dtype_config(tables.DTypeConfig(given, given, given, given))
    backend = tables.BackendConfig("small").set_backend_pattern_config(row)
    placeholder = partial(oracle.named_observers()["PlaceholderObserver"], dtype=given)
    mapping = ao.QConfigMapping().set_global(ao.QConfig(placeholder, placeholder))
    prepared = oracle.prepare(nn.Sequential(nn.ReLU()), (X,), mapping, backend_config=backend)
    assert {observed.dtype for observed in oracle.observed_values(prepared)} == {given}
    if dtype in FLOAT8:
        with pytest.raises(Exception, match="calculate_qparams should not be called for PlaceholderObserver"):
            oracle.reference(prepared, backend_config=backend)
        return
    expected = oracle.reference(prepared, backend_config=backend)(X)
    assert torch.equal(expected, small(small(X, dtype).relu(), dtype))
