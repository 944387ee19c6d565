"""The vocabulary of rearrangements, parts of tensors, joins and sums."""

from __future__ import annotations

from qfunc.ops.kind import Form, Kind, function, kind, method, module


def _inplace(name: str, params: str) -> Form:
    """`x.f_()`, which gives x another shape."""
    return method(f"{name}_", params, emit=name, inplace=True)


def _copy(name: str, params: str, *forms: Form, sizes: str = "") -> Kind:
    """A rearrangement of elements, as `torch.f` and `x.f()`; what has a default is given where it differs."""
    written = params.replace("*", "")
    required, _, optional = written.partition("=")[0].rpartition(", ")
    full = f"torch.{name}({required}, {optional})"
    return kind(
        name,
        written,
        function(f"torch.{name}", written),
        method(name, params),
        *forms,
        call=f"torch.{name}({required})" if "=" in written else full,
        full_call=full if "=" in written else "",
        sizes=sizes,
    )


def _reduction(name: str) -> Kind:
    params = "input, dim=None, keepdim=False, dtype=None"
    return kind(
        name,
        params,
        function(f"torch.{name}", params),
        method(name, params),
        call=f"torch.{name}(input, dim, keepdim, dtype=)",
    )


def _parts(name: str, params: str, keywords: str) -> Kind:
    """A division into a tuple of views, as `torch.f` with keywords of its own, and `x.f()`."""
    return kind(
        name,
        params,
        function(f"torch.{name}", keywords),
        method(name, params),
        call=f"torch.{name}({', '.join(part.partition('=')[0] for part in params.split(', '))})",
    )


PARTS = frozenset({"chunk", "split", "unbind"})
"""The kinds that give a tuple of parts of their input."""

SHAPES: tuple[Kind, ...] = (
    kind(
        "cat",
        "tensors, dim=0",
        *(function(f"torch.{name}", "tensors, dim=0") for name in ("cat", "concat", "concatenate")),
        tensors="tensors",
        call="torch.cat(tensors, dim)",
    ),
    kind(
        "stack",
        "tensors, dim=0",
        function("torch.stack", "tensors, dim=0"),
        tensors="tensors",
        call="torch.stack(tensors, dim)",
    ),
    _reduction("mean"),
    _reduction("sum"),
    kind(
        "flatten",
        "input, start_dim=0, end_dim=-1",
        module("torch.nn.Flatten", "start_dim end_dim"),
        function("torch.flatten", "input, start_dim=0, end_dim=-1"),
        method("flatten", "input, start_dim=0, end_dim=-1"),
        function("torch.ravel", "input"),
        method("ravel", "input"),
        call="torch.flatten(input, start_dim, end_dim)",
    ),
    # A view of channels-last memory may be impossible where the same view of the float model's memory is not.
    _copy("reshape", "input, *shape", method("view", "input, *shape", emit="reshape")),
    _copy("permute", "input, *dims", function("torch.permute_copy", "input, dims")),
    _copy(
        "transpose",
        "input, dim0, dim1",
        *(
            form
            for name, first, second in (("swapaxes", "axis0", "axis1"), ("swapdims", "dim0", "dim1"))
            for params in (f"input, dim0:{first}, dim1:{second}",)
            for form in (function(f"torch.{name}", params), method(name, params), _inplace(name, params))
        ),
        _inplace("transpose", "input, dim0, dim1"),
    ),
    _copy("squeeze", "input, dim=None", _inplace("squeeze", "input, dim=None")),
    _copy("unsqueeze", "input, dim", _inplace("unsqueeze", "input, dim")),
    _copy("unflatten", "input, dim, sizes", module("torch.nn.Unflatten", "dim sizes:unflattened_size"), sizes="sizes"),
    _copy("narrow", "input, dim, start, length"),
    kind(
        "getitem", "input, index", function("operator.getitem", "input, index"), call="operator.getitem(input, index)"
    ),
    _parts("chunk", "input, chunks, dim=0", "input, chunks, dim=0"),
    _parts("split", "input, split_size, dim=0", "input:tensor, split_size:split_size_or_sections, dim=0"),
    _parts("unbind", "input, dim=0", "input, dim=0"),
    kind(
        "expand",
        "input, size",
        method("expand", "input, *size"),
        method("broadcast_to", "input, size"),
        function("torch.broadcast_to", "input, size"),
        call="torch.broadcast_to(input, size)",
    ),
    kind("repeat", "input, repeats", method("repeat", "input, *repeats"), call="torch.Tensor.repeat(input, repeats)"),
    kind(
        "repeat_interleave",
        "input, repeats, dim=None, output_size=None",
        function("torch.repeat_interleave", "input, repeats, dim=None, output_size=None"),
        method("repeat_interleave", "input, repeats, dim=None, output_size=None"),
        call="torch.repeat_interleave(input, repeats, dim, output_size=)",
    ),
    kind(
        "detach",
        "input",
        function("torch.detach", "input"),
        function("torch.detach_", "input", emit="torch.detach", inplace=True),
        method("detach", "input"),
        _inplace("detach", "input"),
        call="torch.detach(input)",
    ),
    kind("contiguous", "input", method("contiguous", "input"), call="torch.clone(input)"),
    _copy("flip", "input, *dims"),
    _copy("movedim", "input, source, destination", function("torch.moveaxis", "input, source, destination")),
    _copy("select", "input, dim, index"),
    _copy("index_select", "input, dim, index"),
    kind(
        "roll",
        "input, shifts, dims=()",
        function("torch.roll", "input, shifts, dims=()"),
        method("roll", "input, shifts, dims=()"),
        call="torch.roll(input, shifts, dims)",
    ),
)
"""The rows of rearrangements, parts, joins and sums."""
