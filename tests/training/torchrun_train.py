"""What each process of `test_distributed.py` runs: `torchrun_train.py FOLDER`.

It leaves what its rank has found in FOLDER.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qfunc import Switches, absorb, convert, materialize, switch, unwrap
from tests.training.models import gradients, histograms, inputs, loss, tensors, train, training

SIZE = 2
STEPS = 3


def batch(step: int, rank: int) -> Tensor:
    """The part of a step's data that a rank has."""
    return inputs(step, 4 * SIZE).chunk(SIZE)[rank]


def first(module: nn.Module) -> nn.Module:
    """Measures the data of the first step, the same in each process."""
    module(inputs(0, 4 * SIZE))
    return module


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)


def trains(rank: int, *, learned: bool, folding: str = "approximate") -> dict[str, Any]:
    """All that is on; what one rank has is what all have once buffers are handed on, in the next forward pass."""
    stage, module = training(learned=learned, folding=folding)
    wrapped = DistributedDataParallel(module)
    train(wrapped, optimizer_of(module), [batch(step, rank) for step in range(STEPS)])
    wrapped.eval()
    out = wrapped(inputs(9))
    absorbed = unwrap(absorb(stage, wrapped).bind(convert).bind(materialize)).eval()(inputs(9))
    of_state = unwrap(absorb(stage, wrapped.state_dict()).bind(convert).bind(materialize)).eval()(inputs(9))
    return {"state": tensors(module), "out": out.detach(), "absorbed": absorbed.detach(), "of_state": of_state.detach()}


def second_stage(rank: int) -> dict[str, Any]:
    """Observers off and norms frozen: the same as one process on all the data."""
    _, module = training()
    switch(first(module), Switches(observe=False, freeze_norms=True))
    wrapped = DistributedDataParallel(module)
    train(wrapped, optimizer_of(module), [batch(step, rank) for step in range(STEPS)])
    return {"state": tensors(module), "gradients": gradients(module)}


def without_rounding(rank: int) -> dict[str, Any]:
    """Learned qparams that nobody reads: DDP has to be told to look for them."""
    _, module = training(learned=True)
    switch(first(module), Switches(fake_quantize=False))
    wrapped = DistributedDataParallel(module, find_unused_parameters=True)
    train(wrapped, optimizer_of(module), [batch(step, rank) for step in range(STEPS)])
    wrapped.eval()(inputs(9))
    plain = DistributedDataParallel(training(learned=True)[1])
    switch(plain, Switches(fake_quantize=False))
    told = ""
    try:
        for step in range(STEPS):
            loss(plain, batch(step, rank)).backward()
    except RuntimeError as error:
        told = str(error)
    return {"state": tensors(module), "told": told}


def late_ranks(rank: int) -> dict[str, Any]:
    """Only the first rank has been trained before: the others get what it has."""
    _, module = training()
    if rank == 0:
        first(module)
    wrapped = DistributedDataParallel(module).eval()
    return {"out": wrapped(inputs(9)).detach(), "state": tensors(module)}


def late_learning(rank: int) -> dict[str, Any]:
    """Learned qparams follow the observer for some steps: they are parameters, but no gradients make them."""
    _, module = training(learned=True)
    wrapped = DistributedDataParallel(module, find_unused_parameters=True)
    optimizer = optimizer_of(module)
    for step, learn in enumerate([False, False, True]):
        switch(module, Switches(learn=learn))
        train(wrapped, optimizer, [batch(step, rank)])
    wrapped.eval()(inputs(9))
    return {"state": tensors(module)}


def no_data(rank: int) -> dict[str, Any]:
    """One rank has an empty batch at first."""
    _, module = training(learned=True, model=nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    wrapped = DistributedDataParallel(module)
    for step in range(2):
        wrapped(batch(step, rank)[: 0 if (rank, step) == (1, 0) else None]).sum().backward()
    wrapped.eval()(inputs(9))
    return {"state": tensors(module)}


def saves_alone(rank: int) -> dict[str, Any]:
    """The first rank writes a checkpoint, in which histograms have a size."""
    module = unwrap(materialize(histograms()))
    wrapped = DistributedDataParallel(module)
    optimizer = optimizer_of(module)
    for step in range(STEPS):
        train(wrapped, optimizer, [batch(step, rank)])
        if rank == 0:
            assert module.state_dict()["activation_post_process_0.observer_state"].numel()
    wrapped.eval()(inputs(9))
    return {"state": {name: tensor for name, tensor in tensors(module).items() if not name.endswith("observer_state")}}


PROGRAMS: dict[str, Callable[[int], dict[str, Any]]] = {
    "observed": lambda rank: trains(rank, learned=False),
    "learned": lambda rank: trains(rank, learned=True),
    "exact": lambda rank: trains(rank, learned=False, folding="exact"),
    "second stage": second_stage,
    "without rounding": without_rounding,
    "late ranks": late_ranks,
    "late learning": late_learning,
    "no data": no_data,
    "saves alone": saves_alone,
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    torch.save({name: program(rank) for name, program in PROGRAMS.items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(Path(sys.argv[1]))
