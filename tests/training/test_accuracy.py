"""What training with quantization gives back of what post-training quantization costs."""

import torch
from torch import nn
from torch.nn import functional

from qfunc import (
    FakeQuantize,
    MeanSquaredError,
    PerChannelMinMax,
    QConfig,
    QConfigMapping,
    QuantSpec,
    absorb,
    calibrate,
    convert,
    fuse,
    lower,
    materialize,
    prepare_qat,
    quantize,
    trace,
    unwrap,
)
from qfunc.testing import sqnr

ACTIVATION = MeanSquaredError(QuantSpec("uint8", 0, 15))
WEIGHT = PerChannelMinMax(QuantSpec("int8", -7, 7, "per_channel_symmetric", ch_axis=0))
AFTER_TRAINING = QConfigMapping().set_global(QConfig(ACTIVATION, WEIGHT))
LEARNED = QConfigMapping().set_global(
    QConfig(FakeQuantize(ACTIVATION, learned=True), FakeQuantize(WEIGHT, learned=True))
)


@torch.no_grad()
def outputs(module, images):
    return torch.cat([module(batch) for batch in images.split(500)])


def prepared_for_training(model, batch):
    graph = unwrap(trace(model, batch).bind(lambda graph: fuse(graph, qat=True)))
    return unwrap(prepare_qat(graph, LEARNED))


def one_epoch(module, teacher, images):
    """Towards what the float model gives, which needs no labels."""
    expected = outputs(teacher, images).log_softmax(1)
    optimizer = torch.optim.SGD(module.parameters(), lr=6e-3, momentum=0.9)
    torch.manual_seed(0)
    steps = torch.randperm(len(images)).split(50)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    for batch in steps:
        given = module.train()(images[batch]).log_softmax(1)
        optimizer.zero_grad()
        functional.kl_div(given, expected[batch], log_target=True, reduction="batchmean").backward()
        optimizer.step()
        schedule.step()


def test_one_epoch_at_4_bits_gives_back_half_of_the_loss(cifar):
    """All layers, input and weights at 4 bits, beside the best range search after training.

    Measured on the 4,000 test images: float 83.82 %, after training 81.60 %, so that half is 82.71 %; in training
    82.98, 82.75, 82.90 and 83.10 % with four orders of the images. Labels in place of the teacher give 82.1 to 82.6 %,
    Adam at most 81.7 %, norms that are frozen from the start 80.6 to 82.6 %.
    """
    calibration = cifar.calibration.split(100)
    after = unwrap(
        quantize(cifar.model, calibration, qconfig_mapping=AFTER_TRAINING, engine="reference", progress=False).bind(
            materialize
        )
    )
    prepared = prepared_for_training(cifar.model, cifar.calibration[:1])
    module = unwrap(calibrate(prepared, calibration, progress=False).bind(materialize))
    one_epoch(module, cifar.model, cifar.calibration)
    converted = unwrap(absorb(prepared, module).bind(convert))
    lowered = unwrap(lower(converted, engine="reference").bind(materialize))

    logits = outputs(lowered, cifar.images)
    before, post, trained = (
        100 * float((each.argmax(1) == cifar.labels).float().mean())
        for each in (outputs(cifar.model, cifar.images), outputs(after, cifar.images), logits)
    )
    assert before - post > 1
    assert before - trained <= (before - post) / 2
    for engine in ("onednn", "reference"):
        made = unwrap(lower(converted, engine=engine).bind(materialize))
        assert sqnr(outputs(module.eval(), cifar.images[:100]), outputs(made, cifar.images[:100])) > 30, engine


def test_a_scale_that_a_step_has_made_negative_is_the_least_one_in_training_and_converted():
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), torch.randn(4, 3, 8, 8)
    prepared = prepared_for_training(model, batch)
    module = unwrap(materialize(prepared))
    module(batch)
    with torch.no_grad():
        module.get_submodule("2").weight_fake_quant.scale[1] = -0.01
    expected = module.eval()(batch)
    stage = unwrap(absorb(prepared, module))
    for made in (materialize(stage), convert(stage).bind(materialize)):
        assert torch.equal(unwrap(made).eval()(batch), expected)
