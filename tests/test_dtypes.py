"""The table of element types, compared with torch, numpy, tritonclient and Triton's own message."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tritonbuild import dtypes
from tritonbuild.dtypes import TABLE, Dtype


@pytest.mark.parametrize("dtype", TABLE, ids=lambda dtype: dtype.torch)
def test_every_row_agrees_with_torch_numpy_and_triton(dtype: Dtype) -> None:
    import numpy
    import torch
    from tritonclient.grpc import model_config_pb2
    from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

    of_torch = getattr(torch, dtype.torch)
    assert torch.empty(3, dtype=of_torch).numpy().dtype == numpy.dtype(dtype.numpy)
    assert of_torch.itemsize == numpy.dtype(dtype.numpy).itemsize == dtype.size_bytes
    assert np_to_triton_dtype(numpy.dtype(dtype.numpy)) == dtype.kserve
    assert numpy.dtype(triton_to_np_dtype(dtype.kserve)) == numpy.dtype(dtype.numpy)
    assert model_config_pb2.DataType.Name(model_config_pb2.DataType.Value(dtype.triton)) == dtype.triton
    if dtype.integer_limits:
        limits = torch.iinfo(of_torch)
        assert dtype.integer_limits == (limits.min, limits.max)
    else:
        assert dtype.largest == (torch.finfo(of_torch).max if of_torch.is_floating_point else 0)
        assert of_torch.is_floating_point or of_torch == torch.bool


def test_every_type_of_torch_is_either_in_the_table_or_refused_with_a_way_out() -> None:
    import torch

    names = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
    # Types below a byte, which no tensor that a model returns has; they are answered like any text.
    shapeless = {name for name in names if re.match(r"u?int[1-7]$|bits|float4|quint[24]x", name)}
    for name in names - shapeless:
        text = dtypes.refusal(name)
        assert (text is None) == (name in dtypes.BY_TORCH)
        assert text is None or text.startswith(f"{name} cannot be served: "), text
    for name in shapeless:
        assert (dtypes.refusal(name) or "").startswith(f'found "{name}", expected one of bool, uint8, ')


def test_names_are_unique() -> None:
    assert len(dtypes.BY_TORCH) == len(dtypes.BY_TRITON) == len(dtypes.BY_KSERVE) == len(TABLE)


REFUSALS = {
    "bfloat16": "bfloat16 cannot be served: Triton's PyTorch backend refuses it when the model loads; "
    "use float32 and cast to bfloat16 inside forward",
    "BF16": "BF16 cannot be served: Triton's PyTorch backend refuses it when the model loads; "
    "use float32 and cast to bfloat16 inside forward",
    "uint16": "uint16 cannot be served: Triton's PyTorch backend refuses it when the model loads; "
    "use int32, which holds every uint16, and cast inside forward",
    "TYPE_UINT32": "TYPE_UINT32 cannot be served: Triton's PyTorch backend refuses it when the model loads; "
    "use int64, which holds every uint32, and cast inside forward",
    "uint64": "uint64 cannot be served: Triton's PyTorch backend refuses it when the model loads; "
    "use int64 and cast inside forward",
    "complex64": "complex64 cannot be served: no Triton type exists for it; "
    "use a real type with a last dim of 2, as torch.view_as_real gives",
    "float8_e4m3fn": "float8_e4m3fn cannot be served: no Triton type exists for it; "
    "use float16 or float32 and cast inside forward",
    "qint8": "qint8 cannot be served: no Triton type exists for it; "
    "use int8 or uint8 with scale and zero point inside the model",
    "BYTES": "BYTES cannot be served: text is not a tensor in torch; use int64 token ids, and tokenize in the client",
    "float": 'found "float"; write torch\'s name, "float32"',
    "TYPE_FP32": 'found "TYPE_FP32"; write torch\'s name, "float32"',
    "torch.int64": 'found "torch.int64"; write torch\'s name, "int64"',
    "FP16": 'found "FP16"; write torch\'s name, "float16"',
    "flaot32": 'found "flaot32", expected one of bool, uint8, int8, int16, int32, int64, float16, '
    "float32, float64; "
    'did you mean "float32"?',
    "": 'found "", expected one of bool, uint8, int8, int16, int32, int64, float16, float32, float64',
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_served_says_why_and_what_to_use(name: str) -> None:
    assert dtypes.refusal(name) == REFUSALS[name]


def test_integer_limits() -> None:
    assert dtypes.integer_limits("uint8") == (0, 255)
    assert dtypes.integer_limits("int64") == (-(2**63), 2**63 - 1)
    assert [dtypes.integer_limits(name) for name in ("float32", "bool", "nonsense")] == [None, None, None]


def test_the_table_is_read_without_torch_and_numpy() -> None:
    code = "import sys, tritonbuild.dtypes; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
