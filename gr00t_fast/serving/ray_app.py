"""The HTTP and WebSocket service as a Ray Serve application: replicas on several GPUs or machines, several checkpoints, health, draining.

    serve run config.yaml       where config.yaml says:

    applications:
    - import_path: gr00t_fast.serving.ray_app:app
      args: {models: {reach: {model_path: DIR}, fold: {model_path: DIR, denoising_steps: 2}}}
      deployments: [{name: PolicyDeployment, num_replicas: 2, ray_actor_options: {num_gpus: 1}}]

A client names its checkpoint in the header `serve_multiplexed_model_id`; without it, it is asked of the first. Each replica joins requests as
`gr00t-fast serve` does.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from gr00t_fast.base.errors import ConfigError, Gr00tFastError, ServerError, closest, require
from gr00t_fast.serving.http import MAX_CONNECTIONS, HttpApplication, http_service, refuse
from gr00t_fast.serving.service import SIZES, Service

serve = require("ray.serve", "ray")
MODELS_PER_REPLICA = 3  # that are loaded at once; the one that was asked for longest ago makes room
_HEALTH_EVERY_S = 5.0
_DRAIN_S = 30.0  # for requests in progress when a replica is to end


class _Model:
    """A checkpoint that is served: loaded, warmed up and asked in one thread, as libraries want it."""

    def __init__(self, options: Mapping[str, Any], max_batch: int, api_token: str | None) -> None:
        self.loaded: Future[Service] = Future()
        self.loaded.set_running_or_notify_cancel()  # whoever waits for it cannot cancel it
        # the thread does not know this object, which ends it when Ray drops it
        self._thread = threading.Thread(target=_serve, args=(self.loaded, options, max_batch, api_token), name="policy", daemon=True)
        self._thread.start()

    @property
    def broken(self) -> bool:
        return self.loaded.done() and self.loaded.exception() is None and not self._thread.is_alive()

    def __del__(self) -> None:
        self.loaded.add_done_callback(lambda loaded: None if loaded.exception() else loaded.result().stop())


def _serve(loaded: Future[Service], options: Mapping[str, Any], max_batch: int, api_token: str | None) -> None:
    from gr00t_fast.policy import load_policy  # imports torch

    try:
        policy = load_policy(**options)
        policy.warm_up()
        service = http_service(policy, api_token)
        service.measure_batches(max_batch)
    except Exception as error:  # noqa: BLE001 - for whoever asks for this model
        loaded.set_exception(error)
        return
    loaded.set_result(service)
    service.run()


@serve.deployment(max_ongoing_requests=MAX_CONNECTIONS, health_check_period_s=_HEALTH_EVERY_S, graceful_shutdown_timeout_s=_DRAIN_S)
@serve.ingress()
class PolicyDeployment:
    """A replica. `models`: name -> arguments of `load_policy`; the first is loaded before the replica takes requests, the others when they are
    asked for."""

    def __init__(self, models: Mapping[str, Mapping[str, Any]], max_batch: int, api_token: str | None, host_names: Sequence[str]) -> None:
        self._models, self._options, self._host_names = models, (max_batch, api_token), host_names
        self._first = next(iter(models))
        self._loaded: weakref.WeakValueDictionary[str, _Model] = weakref.WeakValueDictionary()

    def __serve_build_asgi_app__(self) -> Any:
        async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:  # a function: uvicorn takes a method for ASGI 2
            await self._answer(scope, receive, send)

        return application

    @serve.multiplexed(max_num_models_per_replica=MODELS_PER_REPLICA)
    async def load(self, name: str) -> tuple[_Model, HttpApplication]:
        """Raises ServerError for a name that is not served, and what loading raises."""
        if name not in self._models:
            raise ServerError(f"no model '{name}' is served here.{closest(name, self._models)} Expected one of: {', '.join(self._models)}.")
        model = _Model(self._models[name], *self._options)
        application = HttpApplication(await asyncio.wrap_future(model.loaded), self._host_names)
        self._loaded[name] = model
        return model, application

    def check_health(self) -> None:
        """Asked by Ray, which replaces a replica where this raises."""
        if broken := [name for name, model in self._loaded.items() if model.broken]:
            raise ServerError(f"the thread of {', '.join(broken)} has ended.")

    async def _answer(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await self.load(self._first)
            await send({"type": "lifespan.startup.complete"})
            await receive()
            return await send({"type": "lifespan.shutdown.complete"})
        try:
            # shielded: a client that hangs up leaves the loading to the next one, which would load it again beside that
            model, application = await asyncio.shield(self.load(serve.get_multiplexed_model_id() or self._first))
        except Gr00tFastError as error:
            return await refuse(scope, send, error)
        await application(scope, receive, send)
        del model  # it stays for as long as it is asked


def app(args: Mapping[str, Any]) -> Any:
    """The application for `serve run` and `serve.run`. args: `models` as of PolicyDeployment; `max_batch`, `api_token` and `host_names` as of
    `gr00t-fast serve`. Raises ConfigError."""
    known = {"models": {}, "max_batch": SIZES[-1], "api_token": None, "host_names": []}
    if wrong := [name for name in args if name not in known]:
        raise ConfigError(f"args: expected {', '.join(known)}; got {', '.join(wrong)}.")
    options = {**known, **args}
    if not options["models"] or not all("model_path" in model for model in options["models"].values()):
        raise ConfigError("args: expected models, a map from names to arguments of load_policy with a model_path each.")
    return PolicyDeployment.bind(**options)  # type: ignore[attr-defined]
