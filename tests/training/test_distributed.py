"""Training with `DistributedDataParallel`, in real processes under torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qfunc import Switches, switch
from tests.training.models import differing, gradients, inputs, tensors, train, training
from tests.training.torchrun_train import PROGRAMS, SIZE, STEPS, first, optimizer_of

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available() and sys.platform == "linux"), reason="needs gloo on Linux"
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the processes found."""
    folder = tmp_path_factory.mktemp("torchrun")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval=0.1",
        f"--nproc-per-node={SIZE}", "-m", "tests.training.torchrun_train", str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        written, _ = process.communicate(timeout=180)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, written
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]


@pytest.mark.parametrize("program", PROGRAMS)
def test_all_ranks_have_the_same(ranks: list[dict[str, Any]], program: str) -> None:
    for found in ranks[1:]:
        assert not differing(found[program]["state"], ranks[0][program]["state"])


@pytest.mark.parametrize("program", ["observed", "learned", "exact"])
def test_what_is_absorbed_computes_what_the_wrapped_module_does(ranks: list[dict[str, Any]], program: str) -> None:
    for found in ranks:
        for name in ("absorbed", "of_state"):
            torch.testing.assert_close(found[program][name], found[program]["out"], rtol=1e-4, atol=1e-4)


def test_with_what_batches_tell_off_it_is_what_one_process_does(ranks: list[dict[str, Any]]) -> None:
    _, module = training()
    switch(first(module), Switches(observe=False, freeze_norms=True))
    train(module, optimizer_of(module), [inputs(step, 4 * SIZE) for step in range(STEPS)])
    assert not differing(ranks[0]["second stage"]["gradients"], gradients(module), 1e-4)
    assert not differing(ranks[0]["second stage"]["state"], tensors(module), 1e-5)


def test_qparams_that_nobody_reads_have_to_be_looked_for(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "find_unused_parameters=True" in found["without rounding"]["told"]


def test_ranks_that_begin_later_round_as_the_first_does(ranks: list[dict[str, Any]]) -> None:
    _, module = training()
    expected = first(module).eval()(inputs(9))
    for found in ranks:
        assert torch.equal(found["late ranks"]["out"], expected)
