"""Messages as bytes, and bytes as messages: msgpack in the dialect of NVIDIA's GR00T N1.5 service. No sockets here.

    request    {"endpoint": str, "data": {...}, "api_token": str}      reply    {...}, or {"error": str}
    array      {"__ndarray_class__": true, "as_npy": bytes of a .npy file}
    config     {"__ModalityConfig_class__": true, "as_json": '{"delta_indices": [0], "modality_keys": ["video.webcam"]}'}

Whoever reaches the port can send anything, so reading trusts nothing: no pickle, no sizes taken on faith, and memory in proportion to
the message. The header of a .npy file is matched against the one form that numpy writes instead of being evaluated.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sized
from typing import Any

import numpy as np

from gr00t_fast.contracts import ModalityConfig
from gr00t_fast.errors import WireError
from gr00t_fast.optional import require
from gr00t_fast.strict_json import parse_json

MAX_MESSAGE_BYTES = 48 * 2**20  # a batch of eight with two 1280x720 cameras takes 44 MB
# A valid message has some ten containers. msgpack reserves 8 bytes per element that a list *claims*, for each of up to 1024 open lists.
_MAX_CONTAINERS = 512
_MAX_ELEMENTS, _MAX_ELEMENTS_IN_ALL = 2048, 8192  # of one list or map; a text of two letters takes three bytes here and sixty in memory
_MAX_TEXT_BYTES, _MAX_TEXT_ARRAY_BYTES = 2**16, 2**20
_ARRAY, _CONFIG = "__ndarray_class__", "__ModalityConfig_class__"
_NPY_MAGIC = b"\x93NUMPY"
_NPY_HEADER = re.compile(rb"\{'descr': '([<>|=]?)([biufUS])(\d{1,9})', 'fortran_order': (True|False), 'shape': \(([\d, ]{0,200})\),? ?\} *\n?")
_DTYPE = re.compile(r"[<>|=]?[biufUS]\d{1,9}")
_MAX_DIMENSIONS, _MAX_SIZE = 8, 2**32
_LAST_CHARACTER, _SURROGATES = 0x10FFFF, (0xD800, 0xDFFF)  # of Unicode


def encode(message: Any) -> bytes:
    """msgpack of a message that may hold numpy arrays and ModalityConfigs anywhere. Raises WireError for what the protocol cannot carry."""
    return bytes(Encoder().encode(message))


class Encoder:
    """`encode` into memory that is used again: pictures need megabytes, and fresh ones cost a page fault per 4 kB, more than the copying."""

    def __init__(self) -> None:
        """Raises MissingExtraError without msgpack."""
        self._msgpack = require("msgpack", "serving")
        self._packer = self._new_packer()
        self._scratch = bytearray()  # one .npy file: msgpack has copied it before it asks for the next

    def encode(self, message: Any) -> memoryview:
        """The message, in memory that belongs to whoever holds the view: only without one is it used again. Raises WireError."""
        try:
            self._packer.reset()
        except BufferError:  # a view of the last message is still held, by ZeroMQ until it has sent it
            self._packer = self._new_packer()
        try:
            self._packer.pack(message)
        except WireError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise WireError(f"a message must consist of dicts, lists, str, numbers and numpy arrays, but packing it failed: {error}.") from error
        return memoryview(self._packer.getbuffer())

    def _new_packer(self) -> Any:
        return self._msgpack.Packer(default=self._to_wire, autoreset=False)

    def _to_wire(self, value: Any) -> dict[str, Any]:
        if isinstance(value, np.ndarray):
            return {_ARRAY: True, "as_npy": self._npy(value)}
        if isinstance(value, ModalityConfig):
            content = {"delta_indices": list(value.delta_indices), "modality_keys": list(value.modality_keys)}
            return {_CONFIG: True, "as_json": json.dumps(content, separators=(",", ":"))}
        raise WireError(f"the protocol carries dicts, lists, str, numbers and numpy arrays, not {type(value).__name__}. Convert it to a numpy array.")

    def _npy(self, array: np.ndarray) -> memoryview:
        parts = npy_parts(array)
        size = sum(len(part) for part in parts)
        if len(self._scratch) < size:
            self._scratch = bytearray(size)
        view, end = memoryview(self._scratch), 0
        for part in parts:
            view[end : end + len(part)] = part
            end += len(part)
        return view[:end]


def npy_parts(array: np.ndarray) -> tuple[bytes, Any]:
    """Header and numbers as `np.save` writes them, the numbers without a copy where possible. Raises WireError for object arrays and structured
    dtypes."""
    if array.dtype.kind not in "biufUS":
        raise WireError(f"the protocol carries arrays of numbers, bool and text, not dtype {array.dtype}.")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    plain = array.flags.c_contiguous and array.ndim and array.size and array.dtype.kind != "U"
    return header.getvalue(), array.data.cast("B") if plain else array.tobytes(order)


def decode(data: Any, max_bytes: int = MAX_MESSAGE_BYTES) -> Any:
    """The message in `data`, bytes or a view of them; arrays are read-only and in native byte order. Raises WireError, and nothing else,
    whatever `data` holds."""
    if len(data) > max_bytes:
        raise WireError(f"the message has {len(data)} bytes; at most {max_bytes} are accepted. Send fewer or smaller pictures at once.")
    msgpack = require("msgpack", "serving")
    reader = _Reader()
    try:
        return msgpack.unpackb(
            data,
            object_hook=reader.map,
            list_hook=reader.list,
            max_array_len=_MAX_ELEMENTS,
            max_map_len=_MAX_ELEMENTS,
            max_str_len=_MAX_TEXT_BYTES,
            max_ext_len=0,
        )
    except WireError:
        raise
    except (ValueError, TypeError) as error:  # msgpack's own errors are ValueErrors; TypeError: a key that cannot be hashed
        raise WireError(f"expected one msgpack message of the GR00T service protocol: {error or type(error).__name__}.") from error


class _Reader:
    """Hooks for msgpack that count containers and turn marked maps into what they stand for."""

    def __init__(self) -> None:
        self._containers = self._elements = 0

    def list(self, value: list[Any]) -> list[Any]:
        self._count(value)
        return value

    def map(self, value: dict[Any, Any]) -> Any:
        self._count(value)
        if _ARRAY in value:
            return npy_array(value.get("as_npy"))
        if _CONFIG in value:
            return _modality_config(value.get("as_json"))
        return value

    def _count(self, value: Sized) -> None:
        self._containers, self._elements = self._containers + 1, self._elements + len(value)
        if self._containers > _MAX_CONTAINERS or self._elements > _MAX_ELEMENTS_IN_ALL:
            raise WireError(
                f"the message has more than {_MAX_CONTAINERS} lists and maps, or {_MAX_ELEMENTS_IN_ALL} values in them. "
                "Send numbers as numpy arrays, not as nested lists."
            )


def npy_array(data: Any) -> np.ndarray:
    """The array in the bytes of a .npy file (format 1 or 2). Raises WireError unless header and length agree exactly."""
    if not isinstance(data, bytes):
        raise WireError(f"as_npy: expected the bytes of a .npy file, got {type(data).__name__}.")
    start, header = _npy_header(data)
    found = _NPY_HEADER.fullmatch(header)
    if found is None:
        raise WireError("as_npy: the header is not one that numpy writes for an array of numbers, bool or text (object arrays are refused).")
    order, kind, width, fortran, dimensions = (group.decode() for group in found.groups())
    shape = tuple(int(size) for size in dimensions.split(",") if size.strip().isdigit())
    return array_from_bytes(memoryview(data)[start:], f"{order}{kind}{width}", shape, "F" if fortran == "True" else "C")


def _npy_header(data: bytes) -> tuple[int, bytes]:
    """Offset of the numbers, and the header text."""
    length_bytes = {(1, 0): 2, (2, 0): 4}.get(tuple(data[6:8])) if data.startswith(_NPY_MAGIC) else None
    if length_bytes is None:
        raise WireError("as_npy: expected a .npy file of format 1.0 or 2.0.")
    begin = 8 + length_bytes
    end = begin + int.from_bytes(data[8:begin], "little")
    return end, data[begin : min(end, begin + 4096)]


def array_from_bytes(data: Any, dtype: str, shape: tuple[int, ...], order: str = "C") -> np.ndarray:
    """An array in native byte order from raw bytes, read-only where it shares their memory. Raises WireError unless the bytes are exactly what
    dtype and shape need."""
    try:
        wire_type = np.dtype(dtype) if _DTYPE.fullmatch(dtype) else None  # np.dtype evaluates other texts as lists of fields
    except TypeError:
        wire_type = None
    if wire_type is None:
        raise WireError(f"dtype {dtype[:80]!r} is not accepted; expected numbers, bool or text, such as '<f4'.")
    if wire_type.kind in "US" and len(data) > _MAX_TEXT_ARRAY_BYTES:
        raise WireError(f"an array of text has {len(data)} bytes; at most {_MAX_TEXT_ARRAY_BYTES} are accepted.")
    if not wire_type.itemsize or len(shape) > _MAX_DIMENSIONS or not all(0 <= size <= _MAX_SIZE for size in shape):
        raise WireError(
            f"an array of dtype {dtype} with {len(shape)} dimensions is not accepted: at most {_MAX_DIMENSIONS}, none negative or absurd."
        )
    count = math.prod(shape)
    if len(data) != count * wire_type.itemsize:
        raise WireError(f"an array of dtype {dtype} and shape {shape} takes {count * wire_type.itemsize} bytes, but {len(data)} came.")
    try:
        if not count:
            return np.empty(shape, wire_type.newbyteorder("="))
        flat = np.frombuffer(data, wire_type)
        flat = flat.astype(wire_type.newbyteorder("="), copy=not flat.flags.aligned)  # a header of odd length shifts the numbers
    except ValueError as error:  # an empty shape beyond the address space
        raise WireError(f"an array of dtype {dtype} and shape {shape} cannot be made: {error}.") from error
    if wire_type.kind == "U" and not _is_unicode(flat.view(np.uint32)):
        raise WireError(f"an array of dtype {dtype} holds numbers that are no characters.")
    return flat.reshape(shape, order=order)


def _is_unicode(codes: np.ndarray) -> bool:
    """numpy would notice only when the text is read."""
    return not ((codes > _LAST_CHARACTER) | ((codes >= _SURROGATES[0]) & (codes <= _SURROGATES[1]))).any()


def _modality_config(text: Any) -> ModalityConfig:
    try:
        content = parse_json(text) if isinstance(text, str) else None
    except ValueError as error:
        raise WireError(f"as_json: expected JSON, got {text[:80]!r}.") from error
    offsets, keys = (content.get(name) for name in ("delta_indices", "modality_keys")) if isinstance(content, dict) else (None, None)
    is_int = isinstance(offsets, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in offsets)
    if not is_int or not isinstance(keys, list) or not all(isinstance(item, str) for item in keys):
        raise WireError(f'as_json: expected {{"delta_indices": [int], "modality_keys": [str]}}, got {str(text)[:80]!r}.')
    return ModalityConfig(offsets, keys)
