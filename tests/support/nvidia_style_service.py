"""Clients and servers of the GR00T N1.5, N1.6 and N1.7 service protocols, written from their description and independent of gr00t_fast.serving.

They behave like the reference's: a REP socket that answers one request after the other, a REQ socket that waits for ever, `np.save` and
`np.load` for arrays, `kill` answered with nil, "Unknown endpoint" for what is not registered, data left out where an endpoint takes none.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import zmq


@dataclass(frozen=True)
class Modality:
    """Stands for the reference's ModalityConfig."""

    delta_indices: list[int]
    modality_keys: list[str]


def pack(message: Any) -> bytes:
    def special(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            file = io.BytesIO()
            np.save(file, value, allow_pickle=False)
            return {"__ndarray_class__": True, "as_npy": file.getvalue()}
        if hasattr(value, "modality_keys"):
            text = json.dumps({"delta_indices": value.delta_indices, "modality_keys": value.modality_keys}, separators=(",", ":"))
            return {"__ModalityConfig_class__": True, "as_json": text}
        raise TypeError(type(value))

    return msgpack.packb(message, default=special)


def unpack(data: bytes) -> Any:
    def special(value: dict[str, Any]) -> Any:
        if "__ModalityConfig_class__" in value:
            return Modality(**json.loads(value["as_json"]))
        return np.load(io.BytesIO(value["as_npy"]), allow_pickle=False) if "__ndarray_class__" in value else value

    return msgpack.unpackb(data, object_hook=special)


class Client:
    """REQ client. `patience_ms` is a convenience of the tests: the reference's client has none."""

    pack, unpack = staticmethod(pack), staticmethod(unpack)

    def __init__(self, port: int, api_token: str | None = None, patience_ms: int = 20_000) -> None:
        self.api_token = api_token
        self.socket = zmq.Context.instance().socket(zmq.REQ)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, patience_ms)
        self.socket.connect(f"tcp://localhost:{port}")

    def call(self, endpoint: str, data: Any = None, requires_input: bool = True) -> Any:
        request: dict[str, Any] = {"endpoint": endpoint}
        if requires_input:
            request["data"] = data
        if self.api_token:
            request["api_token"] = self.api_token
        self.socket.send(self.pack(request))
        reply = self.unpack(self.socket.recv())
        if "error" in reply:
            raise RuntimeError(f"Server error: {reply['error']}")
        return reply

    def get_action(self, observation: dict[str, Any]) -> dict[str, np.ndarray]:
        return self.call("get_action", observation)

    def close(self) -> None:
        self.socket.close(0)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Server:
    """REP server around any policy, in a thread while used as a context manager."""

    pack, unpack = staticmethod(pack), staticmethod(unpack)

    def __init__(self, policy: Any, api_token: str | None = None, damage: Callable[[bytes], bytes] = bytes, squeezes: bool = False) -> None:
        """`squeezes`: answers to a single observation without axes of length one, as older versions do."""
        self.socket = zmq.Context.instance().socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.api_token, self.damage, self.running = api_token, damage, True
        self.requests: list[dict[str, Any]] = []
        self.endpoints: dict[str, tuple[Callable[..., Any], bool]] = {
            "ping": (lambda: {"status": "ok", "message": "Server is running"}, False),
            "kill": (self._kill, False),
            "get_action": ((lambda seen: _squeezed(policy.get_action(seen), seen)) if squeezes else policy.get_action, True),
            "get_modality_config": (policy.get_modality_config, False),
        }
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _kill(self) -> None:
        self.running = False

    def _run(self) -> None:
        while self.running:
            if self.socket.poll(50):
                self.socket.send(self.damage(self.pack(self._reply(self.socket.recv()))))
        self.socket.close()

    def _reply(self, message: bytes) -> Any:
        try:
            request = self.unpack(message)
            self.requests.append(request)
            if self.api_token is not None and request.get("api_token") != self.api_token:
                return {"error": "Unauthorized: Invalid API token"}
            endpoint = request.get("endpoint", "get_action")
            if endpoint not in self.endpoints:
                raise ValueError(f"Unknown endpoint: {endpoint}")
            handler, requires_input = self.endpoints[endpoint]
            return handler(request.get("data", {})) if requires_input else handler()
        except Exception as error:  # as the reference does: whatever it is, its text is the answer
            if isinstance(error, AssertionError):
                raise
            return {"error": str(error)}

    def __enter__(self) -> Server:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join(10)


def pack_n1d7(message: Any) -> bytes:
    def special(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return {b"nd": True, b"type": value.dtype.str, b"kind": b"", b"shape": value.shape, b"data": value.tobytes()}
        raise TypeError(type(value))

    return msgpack.packb(message, default=special)


def unpack_n1d7(data: bytes) -> Any:
    def special(value: dict[Any, Any]) -> Any:
        if b"nd" not in value:
            return value
        assert value[b"kind"] == b"", "an object array"
        return np.frombuffer(value[b"data"], np.dtype(value[b"type"])).reshape(value[b"shape"])

    return msgpack.unpackb(data, object_hook=special)


class ClientN1d7(Client):
    """Takes nested observations."""

    pack, unpack = staticmethod(pack_n1d7), staticmethod(unpack_n1d7)

    def get_action(self, observation: dict[str, Any]) -> dict[str, np.ndarray]:
        actions, info = self.call("get_action", {"observation": observation, "options": None})
        assert info == {}
        return actions


class ServerN1d7(Server):
    """Around a policy that takes flat observations and nested ones; strict about what it gets."""

    pack, unpack = staticmethod(pack_n1d7), staticmethod(unpack_n1d7)

    def __init__(self, policy: Any) -> None:
        super().__init__(policy)
        self.policy = policy
        self.endpoints |= {"reset": (dict, False), "get_action": (self._act, True), "get_modality_config": (self._configs, False)}

    def _configs(self) -> dict[str, Any]:
        unset = dict.fromkeys(("sin_cos_embedding_keys", "mean_std_embedding_keys", "action_configs"))
        found = {}
        for name, config in self.policy.get_modality_config().items():
            keys = [key.removeprefix(f"{name}.") for key in config.modality_keys]
            found[name] = {"__ModalityConfig__": True, "as_json": {"delta_indices": config.delta_indices, "modality_keys": keys, **unset}}
        return found

    def _act(self, data: dict[str, Any]) -> list[Any]:
        seen = data["observation"]
        assert set(data) == {"observation", "options"}
        assert all(value.dtype == np.uint8 and value.ndim == 5 for value in seen["video"].values())
        assert all(value.dtype == np.float32 and value.ndim == 3 for value in seen["state"].values())
        assert all(isinstance(text, str) for texts in seen["language"].values() for (text,) in texts)
        return [{key.removeprefix("action."): value for key, value in self.policy.get_action(seen).items()}, {}]


def unpack_n1d6(data: bytes) -> Any:
    def special(value: dict[str, Any]) -> Any:
        assert b"nd" not in value, "N1.6's code would leave it a map"
        if "__ModalityConfig_class__" in value:
            return {key: value["as_json"][key] for key in ("delta_indices", "modality_keys")}
        return np.load(io.BytesIO(value["as_npy"]), allow_pickle=False) if "__ndarray_class__" in value else value

    return msgpack.unpackb(data, object_hook=special)


class ClientN1d6(ClientN1d7):
    pack, unpack = staticmethod(pack), staticmethod(unpack_n1d6)


class ServerN1d6(ServerN1d7):
    pack, unpack = staticmethod(pack), staticmethod(unpack_n1d6)

    def _configs(self) -> dict[str, Any]:
        return {name: {"__ModalityConfig_class__": True, "as_json": config["as_json"]} for name, config in super()._configs().items()}


def _squeezed(actions: dict[str, np.ndarray], observation: dict[str, Any]) -> dict[str, np.ndarray]:
    batched = any(value.ndim == 3 for key, value in observation.items() if key.startswith("state."))
    return actions if batched else {key: np.squeeze(values) for key, values in actions.items()}


class InputHandling:
    """What the reference's policy does with an observation before its network sees it, around any policy.

    `prompts` are the texts that reach the network. A state's type is that of the first one; a text must have an axis to index; what comes in a
    batch is taken apart item by item, and a single observation gets its batch axis here, so that its list of texts is printed as one.
    """

    def __init__(self, policy: Any) -> None:
        self._policy, self._types, self.prompts = policy, {}, []
        self.get_modality_config = policy.get_modality_config

    def get_action(self, observation: dict[str, Any]) -> dict[str, np.ndarray]:
        batched = all(value.ndim >= 3 for key, value in observation.items() if "state" in key)
        for key, value in observation.items():
            if "state" in key and value.dtype != self._types.setdefault(key, value.dtype):
                raise ValueError(f"All states corresponding to the same key must be of the same dtype, input dtype: {value.dtype}")
            if "annotation" in key:
                texts = np.array(value) if batched or isinstance(value, str) else np.array(value)[None]
                self.prompts.append(str(texts[0]))
        return self._policy.get_action(observation)


def http_post(url: str, message: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Status and reply of a POST as a json_numpy client sends it."""
    body = message if isinstance(message, bytes) else json_numpy_text(message).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json_numpy_read(response.read())
    except urllib.error.HTTPError as error:
        said = error.read()
        return error.code, json.loads(said) if said.startswith(b"{") else said


def json_numpy_text(message: Any) -> str:
    def special(value: np.ndarray) -> dict[str, Any]:
        return {"__numpy__": base64.b64encode(value.tobytes()).decode(), "dtype": np.lib.format.dtype_to_descr(value.dtype), "shape": value.shape}

    return json.dumps(message, default=special)


def json_numpy_read(text: bytes) -> Any:
    def special(value: dict[str, Any]) -> Any:
        if "__numpy__" not in value:
            return value
        flat = np.frombuffer(base64.b64decode(value["__numpy__"]), np.lib.format.descr_to_dtype(value["dtype"]))
        return flat.reshape(value["shape"]) if value["shape"] else flat[0]

    return json.loads(text, object_hook=special)
