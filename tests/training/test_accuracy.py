"""What training with quantization gives back of what post-training quantization costs."""

import torch
from torch import nn

from qfunc import (
    FakeQuantize,
    MeanSquaredError,
    PerChannelMinMax,
    QConfig,
    QConfigMapping,
    QuantSpec,
    absorb,
    convert,
    fuse,
    materialize,
    prepare_qat,
    trace,
    unwrap,
)

ACTIVATION = MeanSquaredError(QuantSpec("uint8", 0, 15))
WEIGHT = PerChannelMinMax(QuantSpec("int8", -7, 7, "per_channel_symmetric", ch_axis=0))
LEARNED = QConfigMapping().set_global(
    QConfig(FakeQuantize(ACTIVATION, learned=True), FakeQuantize(WEIGHT, learned=True))
)


def test_a_scale_that_a_step_has_made_negative_is_the_least_one_in_training_and_converted():
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), torch.randn(4, 3, 8, 8)
    prepared = unwrap(
        trace(model, batch).bind(lambda graph: fuse(graph, qat=True)).bind(lambda graph: prepare_qat(graph, LEARNED))
    )
    module = unwrap(materialize(prepared))
    module(batch)
    with torch.no_grad():
        module.get_submodule("2").weight_fake_quant.scale[1] = -0.01
    expected = module.eval()(batch)
    stage = unwrap(absorb(prepared, module))
    for made in (materialize(stage), convert(stage).bind(materialize)):
        assert torch.equal(unwrap(made).eval()(batch), expected)
