"""A replica of the Ray application while it loads a checkpoint, without Ray: `serve.multiplexed` is written here after Ray's, which loads one model
at a time and is cancelled with the request that made it load."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from serving_fakes import ArithmeticPolicy

MODULE = "gr00t_fast.serving.ray_app"


def multiplexed(**_: Any) -> Callable[[Any], Any]:
    def decorated(load: Any) -> Any:
        models, lock = {}, asyncio.Lock()

        async def load_once(self: Any, name: str) -> Any:
            async with lock:
                if name not in models:
                    models[name] = await load(self, name)
            return models[name]

        return load_once

    return decorated


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The ASGI application of a replica with one model, `reach`."""
    as_it_is = {"deployment": lambda **_: lambda kind: kind, "ingress": lambda: lambda kind: kind}
    serve = SimpleNamespace(**as_it_is, multiplexed=multiplexed, get_multiplexed_model_id=lambda: "")
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE).PolicyDeployment({"reach": {"model_path": "DIR"}}, 1, None, []).__serve_build_asgi_app__()
    del sys.modules[MODULE]


def test_a_client_that_hangs_up_while_a_checkpoint_loads_leaves_it_to_the_next_one(replica: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, may_end = [], threading.Event()

    def load_policy(**options: Any) -> ArithmeticPolicy:
        loads.append(options)
        assert may_end.wait(60)
        policy = ArithmeticPolicy()
        policy.warm_up = dict
        return policy

    monkeypatch.setattr("gr00t_fast.policy.load_policy", load_policy)
    sent: list[Any] = []

    async def ask() -> None:
        async def send(event: Any) -> None:
            sent.append(event)

        await replica({"type": "http", "method": "GET", "path": "/health", "headers": [], "client": ("127.0.0.1", 1)}, asyncio.Event().wait, send)

    async def scenario() -> None:
        impatient = asyncio.ensure_future(ask())
        while not loads:
            await asyncio.sleep(0.01)
        impatient.cancel()
        await asyncio.wait([impatient])
        patient = asyncio.ensure_future(ask())
        await asyncio.sleep(0.3)
        assert len(loads) == 1, "it is loaded a second time beside the first"
        may_end.set()
        await asyncio.wait_for(patient, 60)

    try:
        asyncio.run(scenario())
    finally:
        may_end.set()
    assert sent[0]["status"] == 200
    assert len(loads) == 1
