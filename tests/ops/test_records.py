"""One record per op for Python, C++ and Triton alike, and one signature with the reference."""

from __future__ import annotations

import importlib
import inspect
import re
import struct
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lacfast import _C, ops, reference
from lacfast.ops.backend import extension
from lacfast.ops.checks import FLOATS
from lacfast.ops.op import Sized, words_format

CSRC = Path(__file__).parents[2] / "csrc"
RECORDS = {
    name: record
    for module in (
        "advantages",
        "gae",
        "gaussian_step",
        "gaussian_step_in_place",
        "noise",
        "ppo_loss",
        "smc",
        "step_log_prob",
        "value_pool",
    )
    for name, record in vars(importlib.import_module(f"lacfast.ops.{module}")).items()
    if hasattr(record, "_fields") and record.__module__ == f"lacfast.ops.{module}"
}
KINDS = {"Tensor": "t", "SizedTensor": "s", "double": "d", "Flag": "i"}
KINDS |= {"List<std::int64_t>": "I", "List<double>": "D"}


def structs() -> dict[str, str]:
    """Name of every struct of the kernels -> its body, comments gone."""
    sources = [path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu"}]
    text = re.sub(r"//[^\n]*", "", "\n".join(path.read_text(encoding="utf-8") for path in sources))
    return dict(re.findall(r"^struct (\w+) \{\n(.*?)^\};", text, re.MULTILINE | re.DOTALL))


def fields_of(struct: str, known: dict[str, str]) -> list[tuple[str, str]]:
    """(name, kind) of each field, those of a struct within in its place."""
    fields = []
    for kind, names in re.findall(r"^  ([\w:<>]+) ([\w, ]+);", known[struct], re.MULTILINE):
        for name in names.split(", "):
            fields += [(name, KINDS[kind])] if kind in KINDS else fields_of(kind, known)
    return fields


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_and_its_struct_have_the_same_fields(name: str) -> None:
    record = RECORDS[name]
    assert fields_of(name, structs()) == list(zip(record._fields, words_format(record), strict=True))


def test_records_of_another_length_are_refused() -> None:
    class Short(NamedTuple):
        rewards: Sized

    with pytest.raises(ValueError, match=r"cpu\.gae: the records of lacfast/ops are not those of ops\.h"):
        extension().kernel("cpu.gae", (words_format(Short), "tt", "i"))
    with pytest.raises(ValueError, match=r"no kernel cpu\.sort in this build"):
        extension().kernel("cpu.sort", ())
    with pytest.raises(ValueError, match="a field for each character of sttd"):
        extension().addresses("sttd", (None, None))


def test_a_number_is_read_by_its_field_whatever_python_calls_it() -> None:
    assert extension().addresses("di", (1, True)) == extension().addresses("di", (1.0, 1))
    with pytest.raises(TypeError):
        extension().addresses("d", ("1",))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.bool], ids=str)
def test_a_tensor_is_read_alike_through_dlpack_and_through_python(dtype: torch.dtype) -> None:
    tensors = [torch.zeros(3, 4, 5, 2, dtype=dtype)[1:], torch.zeros((), dtype=dtype), None]
    tensors += [torch.nn.Parameter(torch.zeros(7, dtype=dtype)) if dtype.is_floating_point else None]
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    words = [extension().addresses("ts", (tensor, tensor)) for tensor in tensors]
    extension().use_dlpack(torch.Tensor, None)
    try:
        assert [extension().addresses("ts", (tensor, tensor)) for tensor in tensors] == words
    finally:
        extension().use_dlpack(torch.Tensor, exchange)
    address, _, *sized = struct.unpack("8q", words[0])
    assert sized == [address, sized[1], 2 * 4 * 5 * 2, 2, 4, 5]
    assert address == tensors[0].data_ptr()


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(AttributeError, match="data_ptr"):
        extension().addresses("t", (3,))


def test_every_kernel_of_the_module_belongs_to_an_op() -> None:
    backend = importlib.import_module("lacfast.ops.backend")
    assert {name.removeprefix("cpu.") for name in _C.kernel_names() if name.startswith("cpu.")} == set(
        backend._KERNELS
    ) - {"gaussian_step_backward"}
    in_cuda = {name for name, kernel in backend._KERNELS.items() if kernel.cuda}
    compiled = {name.removeprefix("cuda.") for name in _C.kernel_names() if name.startswith("cuda.")}
    assert compiled in (set(), in_cuda)


@pytest.mark.parametrize(
    ("module", "kernel", "record"),
    [
        ("gaussian_step", "gaussian_step_kernel", "GaussianStep"),
        ("step_log_prob", "step_log_prob_kernel", "StepLogProb"),
        ("step_log_prob", "step_log_prob_backward_kernel", "StepLogProb"),
        ("ppo_loss", "transition_sums_kernel", "PPOLoss"),
    ],
)
def test_a_triton_kernel_that_takes_a_whole_record_has_its_fields_in_order(
    module: str, kernel: str, record: str
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    names = getattr(importlib.import_module(f"lacfast.kernels.{module}"), kernel).arg_names
    fields = RECORDS[record]._fields
    assert [name.removesuffix("_ptr").lower() for name in names[: len(fields)]] == list(fields)


@pytest.mark.parametrize("name", sorted(set(ops.__all__) - {"available", "backend"}))
def test_an_op_has_the_signature_of_its_equation(name: str) -> None:
    op, equation = (inspect.signature(getattr(module, name)) for module in (ops, reference))
    assert op == equation


@pytest.mark.parametrize("name", sorted(set(ops.__all__) - {"available", "backend"}))
def test_an_op_takes_tensors_first_and_then_keywords(name: str) -> None:
    kinds = [parameter.kind for parameter in inspect.signature(getattr(ops, name)).parameters.values()]
    assert kinds == sorted(kinds)
    assert sum(kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds) <= 8
