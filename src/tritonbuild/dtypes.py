"""Decides which element types a tensor may have, and what each is called by torch, numpy, Triton and KServe.

This is the only table of them. Hides what the PyTorch backend carries: a type that Triton knows but the
backend refuses (bfloat16, the wider unsigned integers) is refused here, before anything is traced, with the
way out. Imports neither torch nor numpy, so that reading a pipeline.yaml stays fast.

Source: the data type table of Triton's model_configuration.md, the byte sizes and protocol names of
triton-inference-server/common, and the PyTorch backend's libtorch_utils.cc, on which it was measured.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from tritonbuild.yamlfile import closest, shown


@dataclass(frozen=True)
class Dtype:
    """One element type that the PyTorch backend carries, exactly, in and out.

    Args:
        torch: Its name in torch, without `torch.`: what pipeline.yaml, signatures and cases say.
        numpy: Its name in numpy, and so in safetensors' numpy flavour.
        triton: Its name in config.pbtxt.
        kserve: Its name in the inference protocol: requests, answers and the server's metadata.
        size_bytes: Bytes of one element.
        integer_limits: Lowest and highest value, of integers only. bool is none.
        largest: Largest finite value, of floats only.
    """

    torch: str
    numpy: str
    triton: str
    kserve: str
    size_bytes: int
    integer_limits: tuple[int, int] | None = None
    largest: float = 0.0


TABLE = (
    Dtype("bool", "bool_", "TYPE_BOOL", "BOOL", 1),
    Dtype("uint8", "uint8", "TYPE_UINT8", "UINT8", 1, (0, 2**8 - 1)),
    Dtype("int8", "int8", "TYPE_INT8", "INT8", 1, (-(2**7), 2**7 - 1)),
    Dtype("int16", "int16", "TYPE_INT16", "INT16", 2, (-(2**15), 2**15 - 1)),
    Dtype("int32", "int32", "TYPE_INT32", "INT32", 4, (-(2**31), 2**31 - 1)),
    Dtype("int64", "int64", "TYPE_INT64", "INT64", 8, (-(2**63), 2**63 - 1)),
    Dtype("float16", "float16", "TYPE_FP16", "FP16", 2, largest=65504.0),
    Dtype("float32", "float32", "TYPE_FP32", "FP32", 4, largest=(2 - 2**-23) * 2.0**127),
    Dtype("float64", "float64", "TYPE_FP64", "FP64", 8, largest=sys.float_info.max),
)

BY_TORCH = {dtype.torch: dtype for dtype in TABLE}
BY_TRITON = {dtype.triton: dtype for dtype in TABLE}
BY_KSERVE = {dtype.kserve: dtype for dtype in TABLE}

_TRITON_HAS_NONE = "no Triton type exists for it"
_BACKEND_REFUSES = "Triton's PyTorch backend refuses it when the model loads"
_AS_INTEGERS = "use int8 or uint8 with scale and zero point inside the model"

# torch's other types: why none of them can be a tensor of a served model, and what to use.
_REFUSED = {
    "bfloat16": (_BACKEND_REFUSES, "use float32 and cast to bfloat16 inside forward"),
    "uint16": (_BACKEND_REFUSES, "use int32, which holds every uint16, and cast inside forward"),
    "uint32": (_BACKEND_REFUSES, "use int64, which holds every uint32, and cast inside forward"),
    "uint64": (_BACKEND_REFUSES, "use int64 and cast inside forward"),
    "quint8": (_TRITON_HAS_NONE, _AS_INTEGERS),
    "qint8": (_TRITON_HAS_NONE, _AS_INTEGERS),
    "qint32": (_TRITON_HAS_NONE, "use int32 with scale and zero point inside the model"),
    "string": ("text is not a tensor in torch", "use int64 token ids, and tokenize in the client"),
}

# What people write for a torch type: torch's own second names, and short names of types that are refused.
_ALIASES = {
    "half": "float16",
    "float": "float32",
    "double": "float64",
    "short": "int16",
    "int": "int32",
    "long": "int64",
    "cfloat": "complex64",
    "cdouble": "complex128",
    "chalf": "complex32",
    "bf16": "bfloat16",
    "str": "string",
    "bytes": "string",
}


def refusal(name: str) -> str | None:
    """Return why a tensor cannot have this element type, with the way out; None when it can.

    Args:
        name: torch's name without `torch.`; any text, for a person wrote it.
    """
    if name in BY_TORCH:
        return None
    plain = name.removeprefix("torch.").lower().removeprefix("type_")
    if (other := BY_KSERVE.get(plain.upper())) or (other := BY_TORCH.get(_ALIASES.get(plain, plain))):
        return f'found {shown(name)}; write torch\'s name, "{other.torch}"'
    plain = _ALIASES.get(plain, plain)
    if plain.startswith("float8"):
        return f"{name} cannot be served: {_TRITON_HAS_NONE}; use float16 or float32 and cast inside forward"
    if "complex" in plain:
        way_out = "use a real type with a last dim of 2, as torch.view_as_real gives"
        return f"{name} cannot be served: {_TRITON_HAS_NONE}; {way_out}"
    if plain in _REFUSED:
        why, way_out = _REFUSED[plain]
        return f"{name} cannot be served: {why}; {way_out}"
    return f"found {shown(name)}, expected one of {', '.join(BY_TORCH)}{closest(plain, BY_TORCH)}"


def integer_limits(name: str) -> tuple[int, int] | None:
    """Return the lowest and the highest value of an integer type; None for floats, bool and unknown names."""
    dtype = BY_TORCH.get(name)
    return dtype.integer_limits if dtype else None
