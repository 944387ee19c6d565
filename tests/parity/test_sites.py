"""The qparams of the observed values and of the weights are those of torch.ao."""

import math

import pytest
import torch

from qfunc import materialize, unwrap
from qfunc.edge.evaluate import Evaluator
from qfunc.testing import oracle
from tests.parity.sides import CASES, CONFIGS, TORCHVISION, Sides, generated, zoo_sides

pytestmark = pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")


def common_groups(sides):
    """The qparams of both, of the groups that both have: most. All are compared in `test_sites_everywhere`."""
    ours, theirs = sides.our_groups, sides.their_groups
    rows = [(sorted(group), ours[group], theirs[group]) for group in ours.keys() & theirs.keys()]
    assert 2 * len(rows) >= len(theirs)
    return rows


def check_qparams(rows, tolerance=1e-6, slack=0.0):
    """Of rows of values, our qparams and theirs."""
    for values, ours, (scales, zero_points) in rows:
        if all(map(math.isfinite, scales)):
            assert torch.allclose(ours.scale.double(), torch.tensor(scales).double(), rtol=tolerance, atol=slack), (
                values
            )
            assert ours.zero_point.reshape(-1).tolist() == list(zero_points), values


def check_weights(sides):
    """Of layers whose result is read: torch.ao removes the others."""
    ours, theirs = sides.our_weights(), oracle.weight_qparams(oracle.reference(sides.theirs, **sides.their_backend))
    assert theirs.keys() <= ours.keys()
    evaluator = Evaluator(sides.converted.graph.sources)
    check_qparams([(name, evaluator.quantized(ours[name].value).qparams, theirs[name]) for name in theirs])
    return ours.keys() == theirs.keys()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_zoo(case, config):
    sides = zoo_sides(case, config)
    check_qparams(common_groups(sides))
    assert check_weights(sides)


OTHERS = tuple(name for name in oracle.BACKENDS if name != "x86")
MODELS = ("resnet", "mobilenet", "inception", "densenet")


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("case", [c for c in CASES if c.name in MODELS], ids=str)
def test_other_backends(case, backend):
    """With the default configuration of each."""
    sides = zoo_sides(case, backend)
    check_qparams(common_groups(sides))
    assert check_weights(sides)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(torchvision_zoo, name):
    """As it is by least and largest value; by histogram, with its batch norms folded.

    torch.ao folds them in float32, qfunc in float64. What that moves the data by, a few parts in a million over tens of
    layers, can decide another step of the histogram's search.
    """
    model, _ = torchvision_zoo.build(name)
    generator = torch.Generator().manual_seed(0)
    batches = tuple((torch.randn(2, 3, 64, 64, generator=generator),) for _ in range(2))
    sides = Sides(model, batches, "minmax")
    check_qparams(common_groups(sides), tolerance=2e-5)
    assert check_weights(sides)
    folded = Sides(unwrap(materialize(sides.fused)), batches)
    check_qparams(common_groups(folded))
    assert check_weights(folded)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("resnet", "mobilenet", "inception")], ids=str)
def test_same_tensors_give_same_qparams(case):
    """Each observer of torch.ao's is fed what it sees in its own model, and the observer of that site the same."""
    sides = zoo_sides(case)
    prepared = oracle.prepare(sides.model, sides.batches[0])
    seen: dict[str, list[torch.Tensor]] = {}
    for node in prepared.graph.nodes:
        if "activation_post_process" in str(node.target):
            group = seen.setdefault(node.args[0].name, [])
            module = prepared.get_submodule(node.target)
            module.register_forward_pre_hook(lambda _, args, group=group: group.append(args[0].clone()))
    theirs = oracle.observer_qparams(_run(prepared, sides.batches))
    for site in sides.ours.prepared.sites.values():
        names = [sides.their_name(tap) for tap in site.taps]
        state = site.observer.init()
        for batch in zip(*(seen[name] for name in names), strict=True):
            for tensor in batch:
                state = site.observer.update(state, tensor)
        check_qparams([(names, site.observer.finish(state), theirs[names[0]])])


def _run(prepared, batches):
    with torch.no_grad():
        for batch in batches:
            prepared(*batch)
    return prepared


@pytest.mark.parametrize("case", generated(40), ids=lambda case: str(case.program.seed))
def test_generated(case):
    sides = Sides(case.module, case.batches(2))
    sides.theirs  # noqa: B018 - fails here if it is torch.ao that cannot
    # what batch norm leaves near zero holds the rounding errors of larger numbers
    check_qparams(common_groups(sides), slack=2e-9)
    check_weights(sides)
