"""`calibrate`: forms of batches, statistics as values that are reused, the progress bar."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from qfunc import (
    Calibrated,
    CustomConfig,
    Histogram,
    MinMax,
    PerChannelMinMax,
    QConfig,
    QConfigMapping,
    QuantSpec,
    calibrate,
    convert,
    fuse,
    lower,
    materialize,
    prepare,
    quantize,
    render,
    trace,
    unwrap,
)
from qfunc.edge.progress import tracked
from qfunc.errors import BadBatch, Interrupted, UserFunctionFailed
from qfunc.ir import digest
from qfunc.numerics.qparams import INT8_NARROW_PER_CHANNEL
from qfunc.testing import same_bits


def tensors(seed: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


A, B = tensors(0, 2, 4), tensors(1, 2, 4)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, a, b=None, scale: float = 1.0):
        out = self.left(a) * scale
        return out if b is None else out + self.right(b)


def two():
    graph = unwrap(trace(Two().eval(), (A[0], B[0]), custom=CustomConfig(concrete_args={"scale": 1.0})))
    return unwrap(prepare(graph))


class Prepared:
    one = unwrap(trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), A[0]).bind(fuse).bind(prepare))


class Endless(IterableDataset):
    """A dataset without a length, whose loader raises when it is asked for one."""

    def __iter__(self):
        return iter(torch.cat(A))


class Items(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.cat(A)[index]


FORMS = {
    "list of tensors": lambda: A,
    "tuple of tensors": lambda: tuple(A),
    "tuples": lambda: [(a,) for a in A],
    "lists": lambda: [[a] for a in A],
    "dicts": lambda: [{"input": a} for a in A],
    "generator": lambda: (a for a in A),
    "iterator": lambda: iter(A),
    "map": lambda: map(torch.clone, A),
    "loader": lambda: DataLoader(Items(), batch_size=2),
    "loader of tuples": lambda: DataLoader(TensorDataset(torch.cat(A)), batch_size=2),
    "loader without length": lambda: DataLoader(Endless(), batch_size=2),
    "torch.split": lambda: torch.split(torch.cat(A), 2),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_come_in_any_form(form: str) -> None:
    made = unwrap(calibrate(Prepared.one, FORMS[form]()))
    assert made == unwrap(calibrate(Prepared.one, A))
    assert made.statistics.batches == 3


def test_several_inputs_by_position_and_by_name() -> None:
    prepared = two()
    positional = unwrap(calibrate(prepared, list(zip(A, B, strict=True))))
    named = unwrap(calibrate(prepared, [{"b": b, "a": a} for a, b in zip(A, B, strict=True)]))
    assert positional == named


def test_quantize_reads_batches_once() -> None:
    read = []

    def batches():
        for index, a in enumerate(A):
            read.append(index)
            yield a

    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    once = unwrap(quantize(model, batches()))
    assert read == [0, 1, 2]
    assert digest(once.graph) == digest(unwrap(quantize(model, A)).graph)


def test_calibration_is_a_value_and_changes_nothing() -> None:
    prepared, batches = two(), list(zip(A, B, strict=True))
    before, rng = digest(prepared.graph), torch.get_rng_state()
    first = unwrap(calibrate(prepared, batches))
    again = unwrap(calibrate(prepared, batches))
    assert first == again
    assert first != unwrap(calibrate(prepared, batches[:1]))
    assert digest(prepared.graph) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert convert(first).unwrap() == convert(first).unwrap()


def test_batches_stay_as_they_are_where_the_model_writes_to_its_input() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x.mul_(2))

    batches = [a.clone() for a in A]
    prepared = unwrap(trace(Writes().eval(), A[0]).bind(prepare))
    first = unwrap(calibrate(prepared, batches))
    assert same_bits(batches, A)
    assert first == unwrap(calibrate(prepared, batches))


def mapping(activation) -> QConfigMapping:
    return QConfigMapping().set_global(QConfig(activation, PerChannelMinMax(INT8_NARROW_PER_CHANNEL)))


def test_statistics_serve_another_configuration_of_the_same_graph() -> None:
    graph = unwrap(trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), A[0]).bind(fuse))
    measured = unwrap(calibrate(unwrap(prepare(graph, mapping(MinMax()))), A))
    for other in (mapping(MinMax(QuantSpec(quant_max=127))), mapping(MinMax()).set_module_name("0", None)):
        prepared = unwrap(prepare(graph, other))
        reused = Calibrated(prepared, measured.statistics)
        assert convert(reused).unwrap() == convert(unwrap(calibrate(prepared, A))).unwrap()


def test_statistics_that_lack_a_site_name_it() -> None:
    graph = unwrap(trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), A[0]).bind(fuse))
    measured = unwrap(calibrate(unwrap(prepare(graph, mapping(MinMax()))), A)).statistics
    histogram = unwrap(prepare(graph, mapping(MinMax()).set_module_name("2", None).set_global(None)))
    assert not histogram.sites
    lacking = unwrap(prepare(graph, mapping(Histogram())))
    error = convert(Calibrated(lacking, measured)).failure()
    assert {p.node for p in error.errors} == {"input 'input'", "0"}


def test_nothing_to_observe_is_fine() -> None:
    prepared = unwrap(prepare(Prepared.one.graph, QConfigMapping()))
    assert unwrap(calibrate(prepared, A)).statistics.batches == 3
    lowered = calibrate(prepared, A).bind(convert).bind(lower).unwrap()
    assert lowered.certificate.in_int8 == 0
    assert same_bits(unwrap(materialize(lowered))(A[0]), unwrap(materialize(prepared))(A[0]))


def test_an_interrupt_carries_what_was_measured() -> None:
    def interrupted():
        yield from A[:2]
        raise KeyboardInterrupt

    error = calibrate(Prepared.one, interrupted()).failure()
    assert isinstance(error, Interrupted)
    assert (error.node, error.batches) == ("batch 2", 2)
    assert error.statistics == unwrap(calibrate(Prepared.one, A[:2])).statistics
    assert calibrate(Prepared.one, A[2:], statistics=error.statistics) == calibrate(Prepared.one, A)
    assert "Ctrl-C" in render(error)


def test_an_error_after_the_first_batch_carries_what_was_measured() -> None:
    error = calibrate(Prepared.one, [A[0], A[1][:, :3], A[2]]).failure()
    bad, kept = error.errors
    assert isinstance(bad, BadBatch)
    assert isinstance(kept, Interrupted)
    assert kept.statistics == unwrap(calibrate(Prepared.one, A[:1])).statistics


def test_the_interpreter_measures_the_same_and_shows_every_value() -> None:
    prepared, batches, shown = two(), list(zip(A, B, strict=True)), []
    found = unwrap(calibrate(prepared, batches, hook=lambda id, _: shown.append(id)))
    assert found == unwrap(calibrate(prepared, batches))
    assert shown == list(prepared.graph.order) * 3

    def raising(id: str, _: object) -> None:
        if id == "mul":
            raise KeyError("mine")

    error = calibrate(prepared, batches, hook=raising).failure()
    assert isinstance(error, UserFunctionFailed)
    assert "KeyError: 'mine'" in error.reason


# Progress -------------------------------------------------------------------------------------------------------------


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, _environ={"TERM": "xterm"})


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(("shown", "terminal", "bar"), [
    (None, True, True), (None, False, False), (False, True, False), (True, True, True),
])  # fmt: skip
def test_the_bar_is_for_terminals_unless_asked_for(shown: bool | None, terminal: bool, bar: bool) -> None:
    screen = console(terminal=terminal)
    assert list(tracked(range(3), "calibrating", shown=shown, total=3, console=screen)) == [0, 1, 2]
    assert ("calibrating" in printed(screen)) == (bar and terminal)
    assert bar or not printed(screen)


@pytest.mark.parametrize(("total", "told"), [(3, "/3"), (None, "/?")])
def test_the_bar_counts_with_and_without_a_total(total: int | None, told: str) -> None:
    screen = console(terminal=True)
    list(tracked((letter for letter in "abc"), "calibrating", shown=None, total=total, console=screen))
    assert told in printed(screen)


def test_the_bar_goes_away_when_closed_early() -> None:
    screen = console(terminal=True)
    bar = tracked(range(3), "calibrating", shown=None, total=3, console=screen)
    next(bar)
    bar.close()
    assert printed(screen).endswith(("\x1b[?25h\x1b[1A\x1b[2K", "\x1b[2K", "\x1b[?25h\r\x1b[1A\x1b[2K"))


def test_no_output_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    unwrap(calibrate(Prepared.one, A))
    assert capfd.readouterr() == ("", "")
