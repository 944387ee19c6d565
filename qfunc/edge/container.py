"""Files of qfunc: a JSON document and tensors, as one safetensors file. Reading trusts nothing and imports nothing.

The document is the only entry of the safetensors metadata, under `KEY`. It is an object with the fields `qfunc`, which
says what the file holds, and `version`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from returns.result import Failure, Success
from torch import Tensor

from qfunc.config.arguments import shown
from qfunc.config.reading import LONGEST, Object, as_written, parse
from qfunc.errors import BadConfig, BadFile, problems, several
from qfunc.result import R

KEY = "qfunc"
"""The name of the document in the metadata."""

MOST_BYTES = 1 << 30
"""How large a file may be that is read."""

MOST_AXES = 16
"""How many axes a tensor may have."""

ANOTHER = "the file is damaged, or was not written by qfunc: give another file, or make it anew"
"""The remedy for a file that cannot be mended."""

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BF16": torch.bfloat16,
        "BOOL": torch.bool,
        "F16": torch.float16,
        "F32": torch.float32,
        "F64": torch.float64,
        "I16": torch.int16,
        "I32": torch.int32,
        "I64": torch.int64,
        "I8": torch.int8,
        "U16": torch.uint16,
        "U32": torch.uint32,
        "U64": torch.uint64,
        "U8": torch.uint8,
    }
)
"""The dtypes that files hold, by their names in safetensors."""


def encode(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> R[bytes]:
    """A document and tensors of `DTYPES` as the bytes of a file; the same bytes for equal ones.

    Returns:
        The bytes, or `BadConfig` where they hold more than can be read again.

    >>> decode(encode({"qfunc": "Nothing", "version": 1}, {"a": torch.ones(2)}).unwrap()).unwrap()[1]
    {'a': tensor([1., 1.])}
    """
    from safetensors import TensorSpec, serialize

    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total + LONGEST > MOST_BYTES:
        reason = f"its tensors have {total} bytes, the most are {MOST_BYTES - LONGEST}"
        return Failure(
            BadConfig("file", reason, "write less: of fewer values, or of fewer batches where all is recorded")
        )
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
            data_ptr=tensor.data_ptr(),
            data_len=tensor.numel() * tensor.element_size(),
        )
        for name, tensor in held.items()
    }
    data = bytes(serialize(specs, {KEY: text}))
    size = int.from_bytes(data[:8], "little")
    if size > LONGEST:
        reason = f"what describes it has {size} characters, the most are {LONGEST}"
        return Failure(BadConfig("file", reason, "write it in several files"))
    return Success(data)


def decode(data: bytes, place: str = "file") -> R[tuple[Object, Mapping[str, Tensor]]]:
    """The document and the tensors of a file's bytes; `BadFile` at `place` for anything else. The bytes are copied.

    >>> print(decode(b"no file").failure().reason)
    it is no safetensors file: header too small
    """
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        reason = f"it is no safetensors file: {str(error).removeprefix('Error while deserializing: ')[:100]}"
        return Failure(BadFile(place, reason, ANOTHER))
    header = _parsed(data[8 : 8 + int.from_bytes(data[:8], "little")], place, "header")
    if isinstance(header, Failure):
        return header
    found = list(_wrong_header(header.unwrap()))
    if found:
        return Failure(several(BadFile(place, reason, ANOTHER) for reason in found))
    text = header.unwrap().get("__metadata__").get(KEY)
    document = _parsed(text.encode("utf-8", "surrogatepass"), place, "document")
    if isinstance(document, Failure):
        return document
    tensors = {name: _tensor(entry) for name, entry in entries}
    wrong = [BadFile(place, f"tensor {shown(n)}: {t}", ANOTHER) for n, t in tensors.items() if isinstance(t, str)]
    if wrong:
        return Failure(several(wrong[:100]))
    return Success((document.unwrap(), {name: t for name, t in tensors.items() if isinstance(t, Tensor)}))


def _parsed(data: bytes, place: str, what: str) -> R[Object]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return Failure(BadFile(place, f"its {what} is no text: {error.reason}", ANOTHER))
    found = parse(text)
    if isinstance(found, Failure):
        return Failure(several(BadFile(place, f"its {what}: {p.reason}", ANOTHER) for p in problems(found.failure())))
    if not isinstance(found.unwrap(), Object):
        return Failure(BadFile(place, f"its {what} is no object", ANOTHER))
    return found


def _wrong_header(header: Object) -> Iterator[str]:
    """What safetensors lets pass: names that stand there twice, and metadata of another kind."""
    names = [name for name, _ in header.pairs]
    if len(set(names)) < len(names):
        yield "its header names a tensor twice"
    metadata = header.get("__metadata__")
    if not isinstance(metadata, Object) or [name for name, _ in metadata.pairs] != [KEY]:
        yield "it is a safetensors file, but not one of qfunc's: its metadata is not one document"
    elif not isinstance(metadata.get(KEY), str):
        yield f"its document is {as_written(metadata.get(KEY))}"


def _tensor(entry: Mapping[str, Any]) -> Tensor | str:
    """A tensor of its own memory, or why there is none."""
    dtype, shape, data = entry["dtype"], entry["shape"], entry["data"]
    if dtype not in DTYPES:
        return f"tensors of dtype {shown(dtype)} are not read"
    if len(shape) > MOST_AXES:
        return f"it has {len(shape)} axes, the most are {MOST_AXES}"
    if not data:
        # Sizes beside a zero can be any number.
        return torch.empty(shape, dtype=DTYPES[dtype]) if max(shape) < 2**31 else "it has an impossible shape"
    if dtype == "BOOL" and any(byte > 1 for byte in data):
        return "it holds bytes that are neither true nor false"
    return torch.frombuffer(data, dtype=DTYPES[dtype]).reshape(shape)
