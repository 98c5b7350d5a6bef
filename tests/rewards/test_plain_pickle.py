"""A pickle of plain data is read as it was written; another is refused, in bounded time and memory."""

from __future__ import annotations

import pickle
import pickletools
import random
import time
import tracemalloc
from collections import OrderedDict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacfast.rewards.plain_pickle import MAX_PICKLE_BYTES, read_plain_pickle
from lacfast.rewards.reward import BadAnswerError
from lacfast.rewards.wire import FlowGRPOFormat

PROTOCOLS = range(2, 6)
NUMPY_1 = {
    2: b"\x80\x02}q\x00(X\x06\x00\x00\x00scoresq\x01]q\x02cnumpy.core.multiarray\nscalar\nq\x03cnumpy\ndtype"
    b"\nq\x04X\x02\x00\x00\x00f8q\x05\x89\x88\x87q\x06Rq\x07(K\x03X\x01\x00\x00\x00<q\x08NNNJ\xff\xff\xff\xff"
    b"J\xff\xff\xff\xffK\x00tq\tbc_codecs\nencode\nq\nX\t\x00\x00\x00\x00\x00\x00\x00\x00\x00\xc3\xa0?q\x0bX"
    b"\x06\x00\x00\x00latin1q\x0c\x86q\rRq\x0e\x86q\x0fRq\x10aX\x07\x00\x00\x00outputsq\x11cnumpy.core."
    b"multiarray\n_reconstruct\nq\x12cnumpy\nndarray\nq\x13K\x00\x85q\x14h\nX\x01\x00\x00\x00bq\x15h\x0c\x86"
    b"q\x16Rq\x17\x87q\x18Rq\x19(K\x01K\x02\x85q\x1ah\x04X\x02\x00\x00\x00f4q\x1b\x89\x88\x87q\x1cRq\x1d(K"
    b"\x03h\x08NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x1eb\x89h\nX\n\x00\x00\x00\x00\x00\xc2\x80>\x00"
    b'\x00\xc2\x80?q\x1fh\x0c\x86q Rq!tq"bu.',
    4: b"\x80\x04\x95\xea\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x06scores\x94]\x94\x8c\x15numpy.core.multi"
    b"array\x94\x8c\x06scalar\x94\x93\x94\x8c\x05numpy\x94\x8c\x05dtype\x94\x93\x94\x8c\x02f8\x94\x89\x88\x87\x94R"
    b"\x94(K\x03\x8c\x01<\x94NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t\x94bC\x08\x00\x00\x00\x00\x00\x00\xe0?"
    b"\x94\x86\x94R\x94a\x8c\x07outputs\x94h\x03\x8c\x0c_reconstruct\x94\x93\x94h\x06\x8c\x07ndarray\x94\x93"
    b"\x94K\x00\x85\x94C\x01b\x94\x87\x94R\x94(K\x01K\x02\x85\x94h\x08\x8c\x02f4\x94\x89\x88\x87\x94R\x94(K\x03h"
    b"\x0cNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t\x94b\x89C\x08\x00\x00\x80>\x00\x00\x80?\x94t\x94bu.",
    5: b"\x80\x05\x95\xeb\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x06scores\x94]\x94\x8c\x15numpy.core.multi"
    b"array\x94\x8c\x06scalar\x94\x93\x94\x8c\x05numpy\x94\x8c\x05dtype\x94\x93\x94\x8c\x02f8\x94\x89\x88\x87\x94R"
    b"\x94(K\x03\x8c\x01<\x94NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t\x94bC\x08\x00\x00\x00\x00\x00\x00\xe0?"
    b"\x94\x86\x94R\x94a\x8c\x07outputs\x94\x8c\x12numpy.core.numeric\x94\x8c\x0b_frombuffer\x94\x93\x94(\x96"
    b"\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00\x80>\x00\x00\x80?\x94h\x08\x8c\x02f4\x94\x89\x88\x87\x94R\x94(K"
    b"\x03h\x0cNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t\x94bK\x02\x85\x94\x8c\x01C\x94t\x94R\x94u.",
}
"""What NumPy 1.26.4 writes of {"scores": [np.float64(0.5)], "outputs": np.array([0.25, 1.0], np.float32)}."""
PLAIN: list[Any] = [
    {
        "scores": [0.5, 1, True, None, -(2**70)],
        "group_rewards": {"counting": [-10.0], "text": ["\u00e9", b"\xff"]},
    },
    OrderedDict(scores=(1.0, 2.0), empty=[(), [], {}, "", b""]),
    ["a" * 300, b"b" * 300, list(range(3000)), {str(number): number for number in range(3000)}],
]
DTYPES = ["?", "i1", "<i2", ">i4", "i8", "u1", "u2", "u4", "u8", "f2", ">f4", "f8"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", PLAIN)
def test_plain_data_are_read_as_they_were_written(value: Any, protocol: int) -> None:
    assert read_plain_pickle(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numeric_arrays_are_read_as_lists(dtype: str, protocol: int) -> None:
    array = np.array([[0, 1, 2], [3, 4, 5]]).astype(dtype)
    arrays = {"rows": array, "columns": array.T, "one": array[0], "none": array[0, :0], "two": array[0]}
    found = read_plain_pickle(pickle.dumps({**arrays, "scalar": array[0, 1]}, protocol))
    assert found == {**{name: value.tolist() for name, value in arrays.items()}, "scalar": 1}


@pytest.mark.parametrize("protocol", sorted(NUMPY_1))
def test_pickles_of_numpy_1_are_read(protocol: int) -> None:
    assert read_plain_pickle(NUMPY_1[protocol]) == {"scores": [0.5], "outputs": [0.25, 1.0]}


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "touched",)  # type: ignore[return-value]

    for protocol in PROTOCOLS:
        with pytest.raises(
            BadAnswerError, match="is not of plain data; pickles may run code, so it is refused"
        ):
            read_plain_pickle(pickle.dumps({"scores": Harmful()}, protocol))
    assert not (tmp_path / "touched").exists()
    for name in ("eval", "getattr"):
        with pytest.raises(BadAnswerError, match=f"builtins.{name} is not of plain data"):
            read_plain_pickle(f"cbuiltins\n{name}\n.".encode())


def an_array(
    dtype: bytes, shape: bytes, data: bytes, state: bytes = b"(K\x03U<NNNJ\xff\xff\xff\xff"
) -> bytes:
    """Protocol 4's array with arguments of one's choice."""
    made = b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    kind = b"\x8c\x05numpy\x8c\x05dtype\x93\x8c" + bytes([len(dtype)]) + dtype + b"\x89\x88\x87R"
    return (
        b"\x80\x04"
        + made
        + b"(K\x01"
        + shape
        + kind
        + b"\x89B"
        + len(data).to_bytes(4, "little")
        + data
        + b"tb."
    )


HOSTILE = {
    "object array from a buffer": an_array(b"O8", b"K\x01\x85", b"A" * 8),
    "array of records": an_array(b"V8", b"K\x01\x85", b"A" * 8),
    "array shorter than its shape": an_array(b"f8", b"K\x7f\x85", b"A" * 8),
    "negative length": an_array(b"f8", b"J\xff\xff\xff\xff\x85", b"A" * 8),
    "2**31 empty rows": an_array(b"f8", b"J\xff\xff\xff\x7fK\x00\x86", b""),
    "dtype state with fields": b"cnumpy\ndtype\n\x8c\x02f8\x89\x88\x87R"
    b"(K\x03\x8c\x01|N\x8c\x01f\x85}K\x08K\x01K\x1btb.",
    "dtype of an object": b"cnumpy\ndtype\n\x8c\x01O\x89\x88\x87R.",
    "scalar of two bytes": b"cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\n\x8c\x02f8\x89\x88\x87R"
    b"C\x02AA\x86R.",
    "frombuffer of a number": b"cnumpy._core.numeric\n_frombuffer\n(K\x01cnumpy\ndtype\n\x8c\x02f8\x89"
    b"\x88\x87R)\x8c\x01CtR.",
    "called text": b"\x8c\x04eval)R.",
    "called class": b"cnumpy\nndarray\n)R.",
    "state of a list": b"]Nb.",
    "memo of 4 GB": b"Nr\xff\xff\xff\x7f0.",
    "text of 4 GB": b"X\xff\xff\xff\xff.",
    "bytes of 2**63": b"\x8e" + b"\xff" * 7 + b"\x7f.",
    "integer of 2 GB": b"\x8b\xff\xff\xff\x7f.",
    "frame of 2**63": b"\x80\x04\x95" + b"\xff" * 8 + b".",
    "10,000 open containers": b"(" * 10_000 + b".",
    "keys that may collide": pickle.dumps({2**61 - 1: 0, 2 * (2**61 - 1): 1}),
    "key that has no hash": b"}]Ns.",
    "odd items": b"}(\x8c\x01au.",
    "append to a tuple": b")Na.",
    "mark and nothing": b"(a.",
    "no mark": b"e.",
    "text in a wrong encoding": b"\x8c\x01\xff.",
    "latin1 that is none": b"c_codecs\nencode\n\x8c\x03\xe2\x82\xac\x8c\x06latin1\x86R.",
    "no opcode": b"\x80\x04\xff.",
    "no end": b"\x80\x04N",
    "instance": pickle.dumps(date(2020, 1, 1)),
    "protocol 0": pickle.dumps([1.0], 0),
    "extension": b"\x82\x01.",
    "persistent id": b"Pid\n.",
    "buffer aside": b"\x97.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(name: str) -> None:
    with pytest.raises(BadAnswerError, match=r"the answer is no plain pickle: ."):
        read_plain_pickle(HOSTILE[name])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"i__main__\nX\n.", "opcode INST"),
        (b"\x80\x04\x8e", "expected 8 bytes|not enough data"),
        (b"L1L\n.", "LONG"),
    ],
)
def test_a_refusal_names_what_it_met(body: bytes, message: str) -> None:
    with pytest.raises(BadAnswerError, match=message):
        read_plain_pickle(body)


BOMBS = {
    "bytes made of the same text": b"c_codecs\nencode\nq\x00X\x00\x00\x01\x00"
    + b"a" * 2**16
    + b"q\x01\x8c\x06latin1q\x02"
    b"\x86q\x03]q\x04(" + b"h\x00h\x03R" * 30_000 + b"e.",
    "numbers made of the same bytes": b"cnumpy._core.numeric\n_frombuffer\nq\x00(B\x00\x00\x01\x00"
    + b"a" * 2**16
    + b"cnumpy\ndtype\n\x8c\x02u1\x89\x88\x87RJ\x00\x00\x01\x00\x85\x8c\x01Ctq\x01]("
    + b"h\x00h\x01R" * 30_000
    + b"e.",
    "lists": b"(" + b"]" * (MAX_PICKLE_BYTES - 4) + b"l.",
    "dicts": b"]" + b"(" + b"}" * (MAX_PICKLE_BYTES - 4) + b"e.",
    "tuples in tuples": b")" + b"\x85" * (MAX_PICKLE_BYTES - 2) + b".",
    "lists in lists": b"]" * (MAX_PICKLE_BYTES // 2) + b"a" * (MAX_PICKLE_BYTES // 2 - 1) + b".",
    "a list in itself": b"]q\x00" + b"h\x00a" * 80_000 + b".",
    "laughs": b"]q\x00" + b"".join(b"](h\x00h\x00h\x00h\x00eq\x00" for _ in range(15_000)) + b".",
    "too long": b"N" * (MAX_PICKLE_BYTES + 1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_few_bytes_take_neither_time_nor_memory(name: str) -> None:
    """A quarter of a megabyte takes 100 MB at most, and some seconds under the tracer."""
    start = time.process_time()
    tracemalloc.start()
    with pytest.raises(BadAnswerError):
        FlowGRPOFormat().scores(BOMBS[name])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6
    assert time.process_time() - start < 20


def test_ten_thousand_mutations_are_read_as_numbers_or_refused() -> None:
    draw = random.Random(0)
    answers = [
        pickle.dumps(answer, protocol)
        for protocol in PROTOCOLS
        for answer in (
            {"scores": [0.5, 1.0], "group_rewards": {"counting": [-10.0]}},
            {"scores": np.array([0.5, 1.0], np.float32)},
            {"scores": [np.float64(0.5), np.float32(1.0)]},
        )
    ] + list(NUMPY_1.values())
    opcodes = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
    refused, start = 0, time.process_time()
    tracemalloc.start()
    for _ in range(10_000):
        body = bytearray(draw.choice(answers))
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(body))
            end = place + draw.randint(0, 9)
            body[place:end] = draw.choice(
                [
                    draw.randbytes(draw.randint(0, 9)),
                    draw.choice(opcodes),
                    draw.choice([b"\xff\xff\xff\x7f", b"O8", b"V8", b"numpy", b"\x00\x00\x00\x00"]),
                    body[(other := draw.randrange(len(body))) : other + draw.randint(1, 30)],
                    bytes([body[place] ^ 1 << draw.randrange(8)]) + body[place + 1 : end],
                ]
            )
            if not body:
                break
        try:
            scores = FlowGRPOFormat().scores(bytes(body))
        except BadAnswerError:
            refused += 1
        else:
            assert all(type(score) is float for (score,) in scores)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 5_000 < refused < 10_000, "mutations reach deep, and some leave the scores readable"
    assert peak < 20e6
    assert time.process_time() - start < 10
