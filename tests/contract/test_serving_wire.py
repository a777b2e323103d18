"""The bytes on the wire: what numpy and the protocol say they are, and what is refused without harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import nvidia_style_service as reference
import pytest
from serving_fakes import Mutator, observation

from gr00t_fast.base.contracts import ModalityConfig
from gr00t_fast.base.errors import WireError
from gr00t_fast.serving import wire

FUZZ_MESSAGES = int(os.environ.get("GR00T_FAST_FUZZ_MESSAGES") or 500)
ARRAYS = {
    "frame": np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3),
    "state": np.linspace(-1, 1, 5)[None],
    "float32": np.float32([[1.5, np.nan, -np.inf]]),
    "columns first": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "every other": np.arange(20)[::2],
    "mirrored frame": np.arange(24, dtype=np.uint8).reshape(2, 4, 3)[:, ::-1],
    "scalar": np.array(3.5),
    "empty": np.zeros((0, 6), np.float32),
    "big endian": np.arange(3, dtype=">f4"),
    "bool": np.array([True, False]),
    "text": np.array(["Pick up the cube", "ä\u6f22"]),
}


def npy(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_the_bytes_of_np_save_and_come_back(name: str) -> None:
    array = ARRAYS[name]
    assert wire.encode({"x": array}) == reference.pack({"x": array})
    for back in (
        wire.decode(reference.pack({"x": [array]}))["x"][0],
        wire.decode(reference.pack_n1d7({"x": [array]}))["x"][0],
        wire.from_json(reference.json_numpy_text({"x": array}).encode())["x"],
    ):
        np.testing.assert_array_equal(back, array)
        assert back.dtype == array.dtype.newbyteorder("=")
        assert back.shape == array.shape
        assert back.flags.aligned
    np.testing.assert_array_equal(reference.unpack_n1d7(wire.encode({"x": array}, n1d7=True))["x"], array)
    np.testing.assert_array_equal(reference.json_numpy_read(wire.to_json({"x": array}))["x"], array)


def test_an_encoder_never_overwrites_a_message_that_is_still_held() -> None:
    encoder = wire.Encoder()
    held = encoder.encode({"x": ARRAYS["frame"]})
    other = encoder.encode({"x": ARRAYS["state"]})
    assert (bytes(held), bytes(other)) == (wire.encode({"x": ARRAYS["frame"]}), wire.encode({"x": ARRAYS["state"]}))
    with pytest.raises(WireError):
        encoder.encode({"x": object()})
    assert bytes(encoder.encode([1, 2])) == wire.encode([1, 2])  # an error leaves nothing behind


def marked(data: Any) -> bytes:
    return msgpack.packb({"__ndarray_class__": True, "as_npy": data})


def n1d7(**change: Any) -> bytes:
    return msgpack.packb({b"nd": True, b"type": "<f4", b"kind": b"", b"shape": [2], b"data": b"\0" * 8} | {k.encode(): v for k, v in change.items()})


def header(descr: str = "'|u1'", shape: str = "(4,)", order: str = "False", values: bytes = b"abcd") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + values


REFUSED = {
    "nothing": b"",
    "half a message": reference.pack({"x": ARRAYS["frame"]})[:-1],
    "two messages": msgpack.packb({}) * 2,
    "number as key": msgpack.packb({1: 2}),
    "extension type": msgpack.packb(msgpack.ExtType(5, b"x")),
    "long text": msgpack.packb("x" * 70000),
    "list that claims four billion": b"\xdd\xff\xff\xff\xff",
    "nested lists": b"\x91" * 100_000 + b"\x90",
    "nested lists that claim 2000 each": b"\xdc\x07\xd0" * 1000,
    "long array of text": marked(npy(np.full(2**20, "ab"))),
    "lists side by side": msgpack.packb([[]] * 2000),
    "pickle": pickle.dumps({"x": 1}),
    "object array": marked(npy(np.array([{}], object), allow_pickle=True)),
    "array as text": marked("x"),
    "values missing": marked(header(values=b"abc")),
    "shape of a terabyte": marked(header(shape="(1000000000000,)")),
    "empty beyond the address space": marked(header(shape="(0,99999999999999999999,9999999999999999999)", values=b"")),
    "shape that is an expression": marked(header(shape="(2**2,)")),
    "header that is an expression": marked(header(descr="__import__('os')")),
    "dtype without size": marked(header(descr="'<U0'", shape="(1000000,)", values=b"")),
    "text that is not Unicode": marked(header(descr="'<U1'", shape="(1,)", values=b"\xff\xff\xff\xff")),
    "n1d7 objects": n1d7(type="|O", shape=[1]),
    "n1d7 negative shape": n1d7(shape=[-1], data=b""),
    "n1d7 no data": msgpack.packb({b"nd": True}),
    "n1d7 config of other types": msgpack.packb({"__ModalityConfig__": True, "as_json": {"delta_indices": ["0"], "modality_keys": []}}),
    "config nested": msgpack.packb({"__ModalityConfig_class__": True, "as_json": "[" * 60000}),
    "config of other types": msgpack.packb({"__ModalityConfig_class__": True, "as_json": '{"delta_indices": ["0"], "modality_keys": []}'}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_without_taking_memory(name: str) -> None:
    data = REFUSED[name]
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            wire.decode(data)
        assert tracemalloc.get_traced_memory()[1] < 24e6
    finally:
        tracemalloc.stop()


def test_oversized_messages_are_refused_unread() -> None:
    with pytest.raises(WireError, match="at most 10"):
        wire.decode(msgpack.packb("x" * 20), max_bytes=10)
    with pytest.raises(WireError, match="at most 10"):
        wire.from_json(b'"' + b"x" * 20 + b'"', max_bytes=10)


@pytest.mark.parametrize("value", [object(), np.array([{}]), np.zeros(2, "i4,f4"), {1, 2}, 2**70, "\ud800", np.datetime64("2025-01-01")])
def test_what_cannot_travel_is_named_by_the_sender(value: Any) -> None:
    for is_n1d7 in (False, True):
        with pytest.raises(WireError):
            wire.encode({"x": value}, is_n1d7)


JSON_REFUSED = {
    "not JSON": b"{'a': 1}",
    "nested": b"[" * 9000,
    "many lists": b"[" + b"[]," * 50_000 + b"0]",
    "many numbers": b"[" + b"1," * 600_000 + b"0]",
    "endless integer": b"1" * 10_000,
    "a number beyond the largest": b'{"a": 1e400}',
    "object dtype": b'{"__numpy__": "AAAAAAAAAAA=", "dtype": "|O", "shape": [1]}',
    "dtype of fields": b'{"__numpy__": "AAAA", "dtype": [["a", "|u1"]], "shape": [3]}',
    "wrong length": b'{"__numpy__": "AAAA", "dtype": "|u1", "shape": [4]}',
    "shape of many dimensions": b'{"__numpy__": "AAAA", "dtype": "|u1", "shape": [' + b"1" * 4000 + b",1" * 400_000 + b"]}",
    "shape beyond the address space": b'{"__numpy__": "", "dtype": "|u1", "shape": [0, 4000000000, 4000000000]}',
}


@pytest.mark.parametrize("name", JSON_REFUSED)
def test_json_is_refused(name: str) -> None:
    with pytest.raises(WireError):
        wire.from_json(JSON_REFUSED[name])


def test_json_carries_numpy_scalars_and_refuses_the_rest() -> None:
    assert wire.from_json(wire.to_json(np.float32(1.5))) == np.float32(1.5)
    for value in (object(), np.array([{}]), {(1, 2): 3}):
        with pytest.raises(WireError):
            wire.to_json({"x": value})


def test_mutated_messages_raise_nothing_but_wire_errors() -> None:
    """GR00T_FAST_FUZZ_MESSAGES=100000 for the long run."""
    seeds = [reference.pack({"endpoint": "get_action", "data": observation(batch)}) for batch in (None, 2)]
    seeds += [reference.pack({"x": array}) for array in ARRAYS.values()]
    seeds.append(wire.encode({"video": ModalityConfig([0], ["video.webcam"])}))
    _fuzz(Mutator(seeds), wire.decode)
    json_seeds = [reference.json_numpy_text({"observation": observation()}).encode(), json.dumps({"encoded": "{}"}).encode()]
    _fuzz(Mutator(json_seeds), wire.from_json)


def _fuzz(mutator: Mutator, read: Any) -> None:
    refused = 0
    for _ in range(FUZZ_MESSAGES):
        data = mutator.next()
        try:
            read(data)
        except WireError:
            refused += 1
    assert refused > FUZZ_MESSAGES / 2
