"""All contracts of engine `"quantized"`."""

from __future__ import annotations

from qfunc.edge.kernels.contract import Contract
from qfunc.edge.kernels.quantized import TorchEngine
from qfunc.edge.kernels.quantized_contracts import quantized_contracts
from qfunc.edge.kernels.quantized_dynamic_contracts import dynamic_contracts, table_contracts
from qfunc.edge.kernels.quantized_layer_contracts import layer_contracts
from qfunc.edge.kernels.quantized_operator_contracts import operator_contracts
from qfunc.numerics.saturation import PairLayouts


def every_quantized_contract(engines: tuple[tuple[TorchEngine, PairLayouts], ...]) -> tuple[Contract, ...]:
    """The contracts of all kernels for these torch engines, whose layouts are known."""
    of_engines = (layer_contracts, dynamic_contracts)
    layers = (contract for engine, layouts in engines for make in of_engines for contract in make(engine, layouts))
    tables = table_contracts() if engines else ()
    return (*quantized_contracts(engines), *layers, *tables, *operator_contracts(tuple(name for name, _ in engines)))
