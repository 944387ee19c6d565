"""The default configurations are torch.ao's: every entry of its mappings, every configuration that has a name there."""

import pytest
import torch

import qfunc
from qfunc import QConfig, QConfigMapping, unwrap
from qfunc.backends import default_mappings, qconfigs
from qfunc.backends.default_mappings import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from qfunc.config.qconfig import wrong_qconfig
from qfunc.config.qconfig_mapping import form_named
from qfunc.errors import UnknownName, problems
from qfunc.testing import oracle
from tests.parity.observer_meaning import meaning

pytestmark = pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")

BACKENDS = ("x86", "fbgemm", "qnnpack", "onednn")

WITHOUT = {"default_debug_qconfig": "its observer records tensors, and never gives qparams"}
"""Configurations of torch.ao's with a name, and why there are none of ours."""


def translated(theirs) -> QConfig:
    return QConfig(meaning(theirs.activation), meaning(theirs.weight))


def compare(ours: QConfigMapping, theirs) -> None:
    """The same entries."""
    entries = {form_named(key): translated(value) for key, value in theirs.object_type_qconfigs.items()}
    assert ours.global_qconfig == translated(theirs.global_qconfig)
    assert ours.object_types.keys() == entries.keys()
    for form, qconfig in ours.object_types.items():
        assert qconfig == entries[form], form
    assert QConfigMapping(ours.global_qconfig, ours.object_types) == ours
    assert not theirs.module_name_regex_qconfigs
    assert not theirs.module_name_qconfigs
    assert not theirs.module_name_object_type_order_qconfigs


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_training(backend):
    ours = unwrap(get_default_qconfig_mapping(backend))
    compare(ours, oracle.default_mapping(backend))
    assert getattr(qfunc, backend.upper()).qconfig_mapping == ours


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_for_training(backend, version):
    ours = unwrap(get_default_qat_qconfig_mapping(backend, version))
    compare(ours, oracle.default_mapping(backend, qat=True, version=version))


@pytest.mark.parametrize("qat", [False, True])
def test_xnnpack(qat):
    compare(default_mappings.symmetric_qnnpack_mapping(qat=qat), oracle.default_mapping("symmetric_qnnpack", qat=qat))
    assert qfunc.EXECUTORCH.qconfig_mapping == default_mappings.symmetric_qnnpack_mapping()


def test_default_arguments():
    assert get_default_qconfig_mapping() == get_default_qconfig_mapping("x86")
    assert get_default_qat_qconfig_mapping() == get_default_qat_qconfig_mapping("x86", 1)
    assert qfunc.NATIVE.qconfig_mapping == unwrap(get_default_qconfig_mapping())


@pytest.mark.parametrize("backend", ["tensorrt", "executorch", "native", "X86", "", None, ["x86"]])
def test_other_backends_have_none(backend):
    for result in (get_default_qconfig_mapping(backend), get_default_qat_qconfig_mapping(backend)):
        (problem,) = problems(result.failure())
        assert isinstance(problem, UnknownName)
        assert problem.known == ("fbgemm", "x86", "qnnpack", "onednn")


def test_other_versions_are_unknown():
    (problem,) = problems(get_default_qat_qconfig_mapping("x86", 2).failure())
    assert (type(problem), problem.node, problem.known) == (UnknownName, "2", ("0", "1"))


NAMED = oracle.named_qconfigs() if oracle.available() else {}


def our_name(name: str) -> str:
    return name.replace("_qconfig", "").upper()


@pytest.mark.parametrize("name", [name for name in NAMED if name not in WITHOUT])
def test_named(name):
    ours = getattr(qconfigs, our_name(name))
    assert ours == translated(NAMED[name])
    assert not list(wrong_qconfig(ours))


def test_no_name_is_left_out():
    ours = {name for name in dir(qconfigs) if isinstance(getattr(qconfigs, name), QConfig) and name[0] != "_"}
    assert ours == {our_name(name) for name in NAMED if name not in WITHOUT}


def test_those_without():
    assert NAMED.keys() >= WITHOUT.keys()
    recorder = NAMED["default_debug_qconfig"].activation()
    recorder(torch.ones(2))
    with pytest.raises(Exception, match="calculate_qparams"):
        recorder.calculate_qparams()
    assert not hasattr(qconfigs, our_name("default_debug_qconfig"))
