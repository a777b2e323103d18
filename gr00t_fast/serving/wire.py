"""Messages as bytes, and bytes as messages: msgpack in the dialects of NVIDIA's GR00T N1.5, N1.6 and N1.7 services, and of openpi. No sockets here.

    request    {"endpoint": str, "data": {...}, "api_token": str}      reply    {...}, or {"error": str, "code": str, only from ours}
    array      {"__ndarray_class__": true, "as_npy": bytes of a .npy file}
    config     {"__ModalityConfig_class__": true, "as_json": '{"delta_indices": [0], "modality_keys": ["video.webcam"]}'}

    N1.7       data of get_action: {"observation": nested (inputs/observation.py), "options"}      reply    [actions, info]
    array      {b"nd": true, b"type": "<f4", b"kind": b"", b"shape": [...], b"data": bytes}, as msgpack_numpy writes it
    config     {"__ModalityConfig__": true, "as_json": {"delta_indices": [0], "modality_keys": ["webcam"], ...}}

    N1.6       N1.7's data and replies with N1.5's arrays
    config     {"__ModalityConfig_class__": true, "as_json": as N1.7's}

    openpi     an observation, and actions, as they are; an error is text
    array      {b"__ndarray__": true, b"data": bytes, b"dtype": "<f4", b"shape": [...]}

All are read wherever they come; which one is written, the writer says.

Whoever reaches the port can send anything, so reading trusts nothing: no pickle, no sizes taken on faith, and memory in proportion to
the message.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import json
import math
from collections.abc import Mapping, Sized
from dataclasses import asdict, is_dataclass
from itertools import starmap
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from gr00t_fast.base.contracts import ModalityConfig, NetworkName, PartStatistics, PolicyMetadata
from gr00t_fast.base.errors import WireError, require
from gr00t_fast.base.files import parse_json

MAX_MESSAGE_BYTES = 48 * 2**20  # a batch of eight with two 1280x720 cameras takes 44 MB
CONTINUED_BY = "prefix"  # the `method` of a prefix; 0.1.0 had "rtc", too
UNAUTHORISED_TEXT, UNKNOWN_ENDPOINT_TEXT = "Unauthorized: Invalid API token", "Unknown endpoint"  # as NVIDIA's server words them
# A valid message has some ten containers. msgpack reserves 8 bytes per element that a list *claims*, for each of up to 1024 open lists.
_MAX_CONTAINERS = 512
_MAX_ELEMENTS, _MAX_ELEMENTS_IN_ALL = 2048, 8192  # of one list or map; a text of two letters takes three bytes here and sixty in memory
_MAX_TEXT_BYTES, _MAX_TEXT_ARRAY_BYTES = 2**16, 2**20
_ARRAY, _CONFIG = "__ndarray_class__", "__ModalityConfig_class__"
_ARRAY_N1D7, _CONFIG_N1D7 = b"nd", "__ModalityConfig__"
_ARRAY_OPENPI, _SCALAR_OPENPI = b"__ndarray__", b"__npgeneric__"
_PREFIXED = ("video", "state", "action")  # modalities whose keys have the modality's name in front in N1.5, and not in N1.6 and N1.7
_KINDS = "biufUS"  # of numpy's dtypes: bool, numbers and text
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_MAX_HEADER_CHARACTERS, _MAX_DTYPE_CHARACTERS = 512, 16
_MAX_DIMENSIONS, _MAX_SIZE = 8, 2**32
_LAST_CHARACTER, _SURROGATES = 0x10FFFF, (0xD800, 0xDFFF)  # of Unicode


def tcp_address(host: str, port: int) -> str:
    """As ZeroMQ writes it."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def encode(message: Any, n1d7: bool = False) -> bytes:
    """msgpack of a message that may hold numpy arrays and ModalityConfigs anywhere. Raises WireError for what the protocol cannot carry."""
    return bytes(Encoder().encode(message, n1d7))


def encode_openpi(message: Any) -> bytes:
    """msgpack of what openpi's clients read: maps, lists, text, numbers and arrays of numbers. Raises WireError."""

    def to_wire(value: Any) -> dict[bytes, Any]:
        if isinstance(value, np.ndarray) and value.dtype.kind in _KINDS:
            return {_ARRAY_OPENPI: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": list(value.shape)}
        raise WireError(f"the protocol carries maps, lists, text, numbers and numpy arrays, not {type(value).__name__}.")

    packed: bytes = require("msgpack", "serving").packb(message, default=to_wire)
    return packed


def modality_config_message(configs: Mapping[str, ModalityConfig], form: NetworkName) -> dict[str, Any]:
    """For `encode`, as the services of that network write it."""
    if form == "n1.5":
        return dict(configs)
    message = {}
    for modality, config in configs.items():
        keys = [key.removeprefix(f"{modality}.") if modality in _PREFIXED else key for key in config.modality_keys]
        told = {} if config.action_configs is None else {"action_configs": config.action_configs}
        message[modality] = {
            _CONFIG if form == "n1.6" else _CONFIG_N1D7: True,
            "as_json": {"delta_indices": list(config.delta_indices), "modality_keys": keys, **told},
        }
    return message


class ModalityConfigN1d7(ModalityConfig):
    """As N1.7's services write it: keys without their modality in front."""

    def of(self, modality: str) -> ModalityConfig:
        """With it."""
        keys = [f"{modality}.{key}" for key in self.modality_keys] if modality in _PREFIXED else self.modality_keys
        return ModalityConfig(self.delta_indices, keys, self.action_configs)


class ModalityConfigN1d6(ModalityConfigN1d7):
    """As N1.6's services write it: N1.7's content under N1.5's name."""


class Encoder:
    """`encode` into memory that is used again: pictures need megabytes, and fresh ones cost a page fault per 4 kB, more than the copying."""

    def __init__(self) -> None:
        """Raises MissingExtraError without msgpack."""
        self._msgpack = require("msgpack", "serving")
        self._packer = self._new_packer()
        self._scratch = bytearray()  # one .npy file: msgpack has copied it before it asks for the next
        self._n1d7 = False

    def encode(self, message: Any, n1d7: bool = False) -> memoryview:
        """The message, in memory that belongs to whoever holds the view: only without one is it used again. n1d7: arrays in N1.7's form.
        Raises WireError."""
        self._n1d7 = n1d7
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
            if value.dtype.kind not in _KINDS:
                raise WireError(f"the protocol carries arrays of numbers, bool and text, not dtype {value.dtype}.")
            return _array_n1d7(value) if self._n1d7 else {_ARRAY: True, "as_npy": self._npy(value)}
        if isinstance(value, ModalityConfig):
            content = {"delta_indices": list(value.delta_indices), "modality_keys": list(value.modality_keys)}
            return {_CONFIG: True, "as_json": json.dumps(content, separators=(",", ":"))}
        raise WireError(f"the protocol carries dicts, lists, str, numbers and numpy arrays, not {type(value).__name__}. Convert it to a numpy array.")

    def _npy(self, array: np.ndarray) -> memoryview:
        """As `np.save` writes it, the numbers without another copy where possible."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
        order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        begin, numbers = len(header.getvalue()), _bytes_of(array) if array.flags.c_contiguous else array.tobytes(order)
        if len(self._scratch) < begin + len(numbers):
            self._scratch = bytearray(begin + len(numbers))
        view = memoryview(self._scratch)[: begin + len(numbers)]
        view[:begin], view[begin:] = header.getvalue(), numbers
        return view


def _array_n1d7(array: np.ndarray) -> dict[Any, Any]:
    numbers = _bytes_of(np.ascontiguousarray(array) if array.ndim else array)
    return {_ARRAY_N1D7: True, b"type": array.dtype.str, b"kind": b"", b"shape": list(array.shape), b"data": numbers}


def _bytes_of(array: np.ndarray) -> Any:
    """Without a copy where that is possible."""
    return array.data.cast("B") if array.ndim and array.size and array.dtype.kind != "U" else array.tobytes()


def decode(data: Any, max_bytes: int = MAX_MESSAGE_BYTES) -> Any:
    """The message in `data`, bytes or a view of them; arrays are read-only and in native byte order. Raises WireError, and nothing else,
    whatever `data` holds."""
    return decode_with_form(data, max_bytes)[0]


def decode_with_form(data: Any, max_bytes: int = MAX_MESSAGE_BYTES) -> tuple[Any, bool]:
    """As `decode`, and whether any array was in N1.7's form."""
    if len(data) > max_bytes:
        raise WireError(f"the message has {len(data)} bytes; at most {max_bytes} are accepted. Send fewer or smaller pictures at once.")
    msgpack = require("msgpack", "serving")
    reader = _Reader()
    try:
        message = msgpack.unpackb(
            data,
            object_hook=reader.map,
            list_hook=reader.list,
            max_array_len=_MAX_ELEMENTS,
            max_map_len=_MAX_ELEMENTS,
            max_str_len=_MAX_TEXT_BYTES,
            max_ext_len=0,
        )
        return message, reader.met_n1d7
    except WireError:
        raise
    except (ValueError, TypeError) as error:  # msgpack's own errors are ValueErrors; TypeError: a key that cannot be hashed
        raise WireError(f"expected one msgpack message of the GR00T service protocol: {error or type(error).__name__}.") from error


class _Reader:
    """Hooks for msgpack that count containers and turn marked maps into what they stand for."""

    def __init__(self) -> None:
        self._containers = self._elements = 0
        self.met_n1d7 = False

    def list(self, value: list[Any]) -> list[Any]:
        self._count(value)
        return value

    def map(self, value: dict[Any, Any]) -> Any:
        self._count(value)
        if _ARRAY in value:
            return npy_array(value.get("as_npy"))
        if _CONFIG in value:
            told = value.get("as_json")
            return _modality_config(told, ModalityConfig if isinstance(told, str) else ModalityConfigN1d6)
        if _CONFIG_N1D7 in value:
            return _modality_config(value.get("as_json"), ModalityConfigN1d7)
        if _ARRAY_N1D7 in value:
            self.met_n1d7, array = True, _numpy_value(value, b"type")
            return array if value[_ARRAY_N1D7] is True else array[()]
        if _ARRAY_OPENPI in value:
            return _numpy_value(value, b"dtype")
        if _SCALAR_OPENPI in value and type(value.get(b"data")) in (bool, int, float):
            return value[b"data"]
        return value

    def _count(self, value: Sized) -> None:
        self._containers, self._elements = self._containers + 1, self._elements + len(value)
        if self._containers > _MAX_CONTAINERS or self._elements > _MAX_ELEMENTS_IN_ALL:
            raise WireError(
                f"the message has more than {_MAX_CONTAINERS} lists and maps, or {_MAX_ELEMENTS_IN_ALL} values in them. "
                "Send numbers as numpy arrays, not as nested lists."
            )


def _numpy_value(value: Mapping[Any, Any], type_key: bytes) -> np.ndarray:
    """The array that msgpack_numpy, or openpi's form of it, wrote. Raises WireError, for object and structured arrays too."""
    dtype, shape, data = value.get(type_key), value.get(b"shape", []), value.get(b"data")
    dtype = dtype.decode("latin-1") if isinstance(dtype, bytes) else dtype
    is_shape = isinstance(shape, list) and all(type(size) is int for size in shape)
    if not isinstance(dtype, str) or value.get(b"kind", b"") not in (b"", "") or not is_shape or not isinstance(data, bytes):
        raise WireError(f'an array needs {{{type_key!r}: text such as "<f4", b"shape": whole numbers, b"data": bytes}}, and no b"kind".')
    return array_from_bytes(data, dtype, tuple(shape))


def npy_array(data: Any) -> np.ndarray:
    """The array in the bytes of a .npy file (format 1 or 2). Raises WireError unless header and length agree exactly."""
    if not isinstance(data, bytes):
        raise WireError(f"as_npy: expected the bytes of a .npy file, got {type(data).__name__}.")
    file = io.BytesIO(data)
    try:
        read_header = _NPY_HEADERS[np.lib.format.read_magic(file)]
        shape, is_fortran, dtype = read_header(file, max_header_size=_MAX_HEADER_CHARACTERS)
    except Exception as error:  # numpy parses the header as Python, which fails in a dozen ways
        raise WireError(f"as_npy: expected a .npy file of format 1.0 or 2.0: {str(error)[:200]}.") from error
    return array_from_bytes(memoryview(data)[file.tell() :], dtype, shape, "F" if is_fortran else "C")


def array_from_bytes(data: Any, dtype: Any, shape: tuple[int, ...], order: Literal["C", "F"] = "C") -> np.ndarray:
    """An array in native byte order from raw bytes, read-only where it shares their memory. `dtype`: as numpy writes it, or its text. Raises
    WireError unless the bytes are exactly what dtype and shape need."""
    wire_type = _dtype(dtype)
    if wire_type.kind in "US" and len(data) > _MAX_TEXT_ARRAY_BYTES:
        raise WireError(f"an array of text has {len(data)} bytes; at most {_MAX_TEXT_ARRAY_BYTES} are accepted.")
    if len(shape) > _MAX_DIMENSIONS or not all(0 <= size <= _MAX_SIZE for size in shape):
        raise WireError(f"an array with {len(shape)} dimensions is not accepted: at most {_MAX_DIMENSIONS}, each from 0 to {_MAX_SIZE}.")
    count = math.prod(shape)
    if len(data) != count * wire_type.itemsize:
        raise WireError(f"an array of dtype {wire_type} and shape {shape} takes {count * wire_type.itemsize} bytes, but {len(data)} came.")
    try:
        if not count:
            return np.empty(shape, wire_type.newbyteorder("="))
        flat = np.frombuffer(data, wire_type)
        flat = flat.astype(wire_type.newbyteorder("="), copy=not flat.flags.aligned)  # a header of odd length shifts the numbers
    except ValueError as error:  # an empty shape beyond the address space
        raise WireError(f"an array of dtype {wire_type} and shape {shape} cannot be made: {error}.") from error
    if wire_type.kind == "U" and not _is_unicode(flat.view(np.uint32)):
        raise WireError(f"an array of dtype {wire_type} holds numbers that are no characters.")
    return flat.reshape(shape, order=order)


def _dtype(given: Any) -> np.dtype:
    """Raises WireError for another than numbers, bool and text."""
    dtype = None
    with contextlib.suppress(Exception):  # numpy evaluates texts with commas, which fails in a dozen ways
        dtype = np.dtype(given) if len(str(given)) <= _MAX_DTYPE_CHARACTERS else None
    if dtype is None or dtype.kind not in _KINDS or not dtype.itemsize:
        raise WireError(f"dtype {str(given)[:80]!r} is not accepted; expected numbers, bool or text, such as '<f4'.")
    return dtype


def _is_unicode(codes: np.ndarray) -> bool:
    """numpy would notice only when the text is read."""
    return not ((codes > _LAST_CHARACTER) | ((codes >= _SURROGATES[0]) & (codes <= _SURROGATES[1]))).any()


def _modality_config(text: Any, form: type[ModalityConfig] = ModalityConfig) -> ModalityConfig:
    try:
        content = parse_json(text) if isinstance(text, str) else text
    except ValueError as error:
        raise WireError(f"as_json: expected JSON, got {text[:80]!r}.") from error
    content = content if isinstance(content, dict) else {}
    offsets, keys, actions = (content.get(name) for name in ("delta_indices", "modality_keys", "action_configs"))
    is_int = isinstance(offsets, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in offsets)
    is_action = actions is None or (isinstance(actions, list) and all(isinstance(item, dict) for item in actions))
    if not is_int or not is_action or not isinstance(keys, list) or not all(isinstance(item, str) for item in keys):
        raise WireError(f'as_json: expected {{"delta_indices": [int], "modality_keys": [str]}}, got {str(text)[:80]!r}.')
    return form(offsets, keys, actions)


# JSON with numpy arrays, as the package json_numpy writes it: {"__numpy__": base64 of the raw bytes, "dtype": "<f4", "shape": [16, 5]}.
#
# NVIDIA's HTTP server and its clients patch their json module with that package; this is the format without the patch.


_JSON_ARRAY = "__numpy__"
# A list costs some 20 times the bytes that describe it. Pictures must come as arrays, so a valid message has a few brackets and commas.
_MAX_JSON_CONTAINERS, _MAX_JSON_COMMAS = 10_000, 50_000


def to_json(message: Any) -> bytes:
    """JSON of a message that may hold numpy arrays and scalars. Raises WireError for anything else."""
    try:
        return json.dumps(message, default=_as_json_array, separators=(",", ":")).encode()
    except WireError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"a message must consist of dicts with str keys, lists, str, numbers and numpy arrays: {error}.") from error


def _as_json_array(value: Any) -> dict[str, Any]:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in _KINDS:
        return {_JSON_ARRAY: base64.b64encode(value.tobytes()).decode(), "dtype": value.dtype.str, "shape": value.shape}
    raise WireError(f"the protocol carries numbers, text and numpy arrays, not {type(value).__name__}.")


def from_json(data: bytes | bytearray, max_bytes: int = MAX_MESSAGE_BYTES) -> Any:
    """The message in `data`, arrays as writable copies. Raises WireError, and nothing else, whatever `data` is."""
    if len(data) > max_bytes:
        raise WireError(f"the message has {len(data)} bytes; at most {max_bytes} are accepted. Send fewer or smaller pictures at once.")
    if data.count(b"[") + data.count(b"{") > _MAX_JSON_CONTAINERS or data.count(b",") > _MAX_JSON_COMMAS:
        raise WireError('the message has too many lists. Send pictures as arrays {"__numpy__": base64, "dtype": "|u1", "shape": [...]} (json_numpy).')
    try:
        return parse_json(data, _from_json_array)
    except WireError:
        raise
    except ValueError as error:  # not JSON, not UTF-8, NaN, an integer of thousands of digits; nested beyond reason
        raise WireError(f"expected JSON: {error}.") from error


def _from_json_array(value: dict[str, Any]) -> Any:
    if _JSON_ARRAY not in value:
        return value
    text, dtype, shape = value[_JSON_ARRAY], value.get("dtype"), value.get("shape")
    if not isinstance(text, str) or not isinstance(dtype, str) or not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise WireError('an array needs {"__numpy__": base64 text, "dtype": text such as "<f4", "shape": list of whole numbers}.')
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise WireError(f"__numpy__: not base64: {error}.") from error
    array = array_from_bytes(raw, dtype, tuple(shape))
    return array if shape else array[()]


# `PolicyMetadata` as a message of plain maps, lists, text and numbers, and back; for the endpoint `get_facts`, which NVIDIA's server lacks.


def metadata_to_message(metadata: PolicyMetadata) -> dict[str, Any]:
    """Numbers travel as float64, so they arrive as they were."""
    return _plain(asdict(metadata))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def metadata_from_message(message: Any) -> PolicyMetadata:
    """Raises WireError that names the field unless every fact is of the form that `PolicyMetadata` has: what is checked against these metadata is an
    arm."""
    facts: dict[str, Any] = {}
    for name, hint in get_type_hints(PolicyMetadata).items():
        value = message.get(name) if isinstance(message, dict) else None
        try:
            facts[name] = _typed(value, hint)
        except (ValueError, TypeError, KeyError) as error:
            raise WireError(f"get_facts: the server's '{name}' makes no sense: {str(value)[:80]}. Do both ends have the same version?") from error
    for modality in ("state", "action"):
        widths = {part: known.min.size for part, known in facts[f"{modality}_statistics"].items()}
        if widths != facts[f"{modality}_widths"]:
            raise WireError(f"get_facts: the server's '{modality}_statistics' are of {widths} numbers, not of {facts[f'{modality}_widths']}.")
    return PolicyMetadata(**facts)


def _typed(value: Any, hint: Any) -> Any:
    """`value` as the annotation says; numbers are positive, texts and maps not empty. Raises ValueError, TypeError or KeyError."""
    kind, items = get_origin(hint), get_args(hint)
    if type(None) in items:
        return None if value is None else _typed(value, items[0])
    if kind is tuple:
        return tuple(starmap(_typed, zip(value, items, strict=True)))
    if kind is not None:  # a mapping
        if not value or not isinstance(value, dict):
            raise ValueError("no map")
        return {_typed(key, items[0]): _typed(item, items[1]) for key, item in value.items()}
    if hint is PartStatistics:
        return _statistics(value)
    if is_dataclass(hint):
        return hint(**{name: _typed(value[name], each) for name, each in get_type_hints(hint).items()})
    if type(value) is not hint and not (hint is float and type(value) is int):
        raise TypeError(f"no {hint}")
    if hint is not bool and (not value or (hint is not str and not 0 < value < math.inf)):
        raise ValueError("empty, or no positive number")
    return hint(value)


def _statistics(value: Any) -> PartStatistics:
    arrays = {name: np.asarray(value[name], np.float64) for name in ("min", "max", "q01", "q99")}
    if any(array.shape != arrays["min"].shape or array.ndim != 1 or not np.isfinite(array).all() for array in arrays.values()):
        raise ValueError("no finite numbers of one length")
    return PartStatistics(**arrays)
