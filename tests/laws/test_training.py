"""The laws of training on the zoo, on random models and on random configurations."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings

from qfunc import CPU, X86
from qfunc.testing import TRAINING_IS_TOTAL, TRAINING_LAWS, Case, TrainingCase, check_law, check_training_laws
from qfunc.testing.training_strategies import training_cases
from tests.zoo import ZOO, ZooCase

FEWER = max(10, settings().max_examples // 2)


def hold(training: TrainingCase) -> None:
    violations = check_training_laws(training)
    assert not violations, "\n".join(map(str, violations))


@settings(max_examples=FEWER)
@given(training=training_cases())
def test_laws_hold_on_random_models(training: TrainingCase) -> None:
    hold(training)


@settings(max_examples=FEWER)
@given(training=training_cases(configured=True))
def test_laws_hold_for_random_configurations(training: TrainingCase) -> None:
    hold(training)


@settings(max_examples=FEWER)
@given(training=training_cases(aliasing=True, max_nodes=5))
def test_laws_hold_where_memory_is_shared(training: TrainingCase) -> None:
    hold(training)


@given(training=training_cases(max_nodes=4, invalid=True))
def test_impossible_configurations_fail_and_never_raise(training: TrainingCase) -> None:
    violation = check_law(TRAINING_IS_TOTAL, training)
    assert violation is None, violation
