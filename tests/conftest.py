"""Hypothesis profiles, one thread, and the data that some tests use where it is there."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

SHARED = Path(__file__).resolve().parents[1].parent / "shared"

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile("ci", derandomize=True, max_examples=50, deadline=None, suppress_health_check=_SLOW)
settings.register_profile("dev", max_examples=25, deadline=None, suppress_health_check=_SLOW)
settings.register_profile("deep", max_examples=1000, deadline=None, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# No file of the user's is read or written; what a test checks of the file it says itself.
os.environ["QFUNC_CACHE"] = ""

# Laws compare bit for bit, and sums of floats depend on how threads divide them; tensors this small are faster on one
# thread anyway, and pytest-xdist has a process per core.
torch.set_num_threads(1)


def shared_path(name: str) -> Path:
    """A file beside the project; the test is skipped where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs ../shared/{name}")
    return path


def load_shared(name: str) -> ModuleType:
    """A Python file beside the project, as a module."""
    path = shared_path(name)
    spec = importlib.util.spec_from_file_location(f"shared_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Cifar(NamedTuple):
    """The trained ResNet-20 and its images: float (n, 3, 32, 32), labels (n,)."""

    model: nn.Module
    calibration: Tensor
    images: Tensor
    labels: Tensor


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data beside the project."""
    return shared_path("")


@pytest.fixture(scope="session")
def cifar() -> Cifar:
    """ResNet-20 and CIFAR-10. Do not change the model: all tests of a run get the same one."""
    shared_path("data/cifar10.npz")
    module = load_shared("data/resnet20.py")
    images, labels = module.load_images("test")
    return Cifar(module.load_model(), module.load_images("calibration")[0], images, labels)


@pytest.fixture(scope="session")
def torchvision_zoo() -> ModuleType:
    """`build(name)` and `NAMES` of torchvision's models."""
    pytest.importorskip("numpy")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    return load_shared("zoo.py")
