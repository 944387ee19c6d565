"""The decomposed form has the operators and the literals of torch.ao's."""

import pytest
import torch

from qfunc import lower, materialize, unwrap
from qfunc.testing import oracle, sqnr
from tests.parity.sides import CASES, outputs, zoo_sides

pytestmark = [
    pytest.mark.skipif(not oracle.available(), reason="needs torch.ao"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation.*:UserWarning"),
]

# in "shared", torch.ao gives one module the qparams of its last site: see `test_flaws`
NAMES = ("resnet", "mobilenet", "functional", "unet", "conv1d", "squeezenet")
COMPARED = [case for case in CASES if case.name in NAMES]


NAMES_OF = ("scale", "zero_point", "quant_min", "quant_max", "dtype")


def our_literals(sides, graph, verb):
    """The arguments of each `<verb>_per_tensor`, by torch.ao's name of the value that is quantized."""
    found = {}
    for node in graph:
        if node.kind == f"torch.ops.quantized_decomposed.{verb}_per_tensor.default":
            source = node if verb == "quantize" else graph[next(node.uses())]
            name = sides.their_name(next(source.uses()))
            assert name not in found
            found[name] = [node.get(argument) for argument in NAMES_OF]
    return found


def their_literals(module, verb):
    """The same; where a value has several users torch.ao writes a dequantize for each."""
    found = {}
    for node in module.graph.nodes:
        if str(node.target) == f"quantized_decomposed.{verb}_per_tensor.default":
            source = node.args[0] if verb == "quantize" else node.args[0].args[0]
            found.setdefault(source.name, []).append(node.args[1:])
    return found


def test_there_is_something_to_compare():
    assert {case.name for case in COMPARED} >= {"resnet", "mobilenet"}


@pytest.mark.parametrize("config", ["minmax", "moving_average"])
@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_activations_have_the_same_operators_and_literals(case, config):
    """Only the clamp of 7-bit activations differs: torch.ao's form clamps them to 127, its kernels and qfunc to 255."""
    sides = zoo_sides(case, config)
    ours = unwrap(lower(sides.converted, engine="decomposed")).graph
    theirs = oracle.decomposed(sides.theirs)
    for verb in ("quantize", "dequantize"):
        wanted, found = their_literals(theirs, verb), our_literals(sides, ours, verb)
        assert found.keys() == wanted.keys()
        assert len(wanted) > 3
        for name, calls in wanted.items():
            scale, zero_point, low, high, dtype = found[name]
            for their_scale, their_zero_point, their_low, their_high, their_dtype in calls:
                assert scale == pytest.approx(their_scale, rel=1e-6)
                assert (zero_point, low, str(dtype)) == (their_zero_point, their_low, str(their_dtype))
                assert high == (255 if config == "moving_average" else their_high)


@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_weights_have_the_same_qparams(case):
    sides = zoo_sides(case, "moving_average")
    state = unwrap(materialize(unwrap(lower(sides.converted, engine="decomposed")))).state_dict()
    wanted = oracle.weight_qparams(oracle.reference(sides.theirs))
    layers = {name for name in sides.our_weights() if name in wanted}
    assert layers or case.name == "functional"
    for name in layers:
        scale, zero_point = wanted[name]
        assert state[f"{name}.weight_scale"].tolist() == pytest.approx(list(scale), rel=1e-6)
        assert state[f"{name}.weight_zero_point"].tolist() == list(zero_point)
        assert state[f"{name}.weight"].dtype is torch.int8


@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_outputs_agree(case):
    sides = zoo_sides(case, "minmax")
    ours = unwrap(materialize(unwrap(lower(sides.converted, engine="decomposed"))))
    theirs = oracle.decomposed(sides.theirs)
    assert sqnr(outputs(theirs, sides.batches), outputs(ours, sides.batches)) > 25
