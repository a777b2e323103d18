"""JSON with numpy arrays, as the package json_numpy writes it: {"__numpy__": base64 of the raw bytes, "dtype": "<f4", "shape": [16, 5]}.

NVIDIA's HTTP server and its clients patch their json module with that package; this is the format without the patch.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

import numpy as np

from gr00t_fast.errors import WireError
from gr00t_fast.serving.wire import MAX_MESSAGE_BYTES, array_from_bytes
from gr00t_fast.strict_json import parse_json

_ARRAY = "__numpy__"
# A list costs some 20 times the bytes that describe it. Pictures must come as arrays, so a valid message has a few brackets and commas.
_MAX_CONTAINERS, _MAX_COMMAS = 10_000, 50_000


def to_json(message: Any) -> bytes:
    """JSON of a message that may hold numpy arrays and scalars. Raises WireError for anything else."""
    try:
        return json.dumps(message, default=_to_wire, separators=(",", ":")).encode()
    except WireError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"a message must consist of dicts with str keys, lists, str, numbers and numpy arrays: {error}.") from error


def _to_wire(value: Any) -> dict[str, Any]:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufUS":
        return {_ARRAY: base64.b64encode(value.tobytes()).decode(), "dtype": value.dtype.str, "shape": value.shape}
    raise WireError(f"the protocol carries numbers, text and numpy arrays, not {type(value).__name__}.")


def from_json(data: bytes, max_bytes: int = MAX_MESSAGE_BYTES) -> Any:
    """The message in `data`, arrays as writable copies. Raises WireError, and nothing else, whatever `data` is."""
    if len(data) > max_bytes:
        raise WireError(f"the message has {len(data)} bytes; at most {max_bytes} are accepted. Send fewer or smaller pictures at once.")
    if data.count(b"[") + data.count(b"{") > _MAX_CONTAINERS or data.count(b",") > _MAX_COMMAS:
        raise WireError('the message has too many lists. Send pictures as arrays {"__numpy__": base64, "dtype": "|u1", "shape": [...]} (json_numpy).')
    try:
        return parse_json(data, _from_wire)
    except WireError:
        raise
    except ValueError as error:  # not JSON, not UTF-8, NaN, an integer of thousands of digits; nested beyond reason
        raise WireError(f"expected JSON: {error}.") from error


def _from_wire(value: dict[str, Any]) -> Any:
    if _ARRAY not in value:
        return value
    text, dtype, shape = value[_ARRAY], value.get("dtype"), value.get("shape")
    if not isinstance(text, str) or not isinstance(dtype, str) or not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise WireError('an array needs {"__numpy__": base64 text, "dtype": text such as "<f4", "shape": list of whole numbers}.')
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise WireError(f"__numpy__: not base64: {error}.") from error
    array = array_from_bytes(raw, dtype, tuple(shape))
    return array if shape else array[()]
