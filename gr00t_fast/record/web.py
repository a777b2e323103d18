"""A page in a browser: NiceGUI, who may come in, and pictures that never wait in a queue.

A browser fetches each picture when it has drawn the one before, so that a slow one gets fewer. All else goes through the page's own socket, which
alone can change anything: requests other than GET, from other sites, under foreign names or without the token are refused.
"""

from __future__ import annotations

import contextlib
import functools
import html
import secrets
import socket
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qs, quote

import numpy as np

from gr00t_fast.base.errors import require
from gr00t_fast.record.pictures import jpeg

HERE = "127.0.0.1"
REFRESH_S = 0.2  # of what is no picture
_MOST_CLIENTS = 8
_MOST_PAGES = 24  # that were asked for and not closed yet, those without a socket among them
_MOST_MESSAGE_BYTES = 1 << 16
_COOKIE = "gr00t_fast_page"
_END_S = 1.0
_SCRIPT = """
<script>
 function follow(old, url) {  // the next picture once this one is there: never a queue, and nothing while the page sleeps
   const next = new Image(); next.alt = old.alt; next.id = old.id
   next.onload = () => { old.replaceWith(next); setTimeout(follow, 90, next, url) }
   next.onerror = () => setTimeout(follow, 700, old, url)
   next.src = url + '?' + Date.now()
 }
 function followAll() {
   for (const picture of document.querySelectorAll('img[data-url]')) {
     const url = picture.dataset.url
     delete picture.dataset.url  // once each
     follow(picture, url)
   }
 }
</script>
"""


class WebPage(contextlib.AbstractContextManager):
    """Serves `page`, which a subclass writes, from now until it is left. Raises MissingExtraError without NiceGUI."""

    def __init__(self, sock: socket.socket, hosts: tuple[str, ...], token: str) -> None:
        """sock: one that listens. hosts, token: as of Gate."""
        import cv2  # changes the environment when it is imported

        cv2.setNumThreads(1)
        self.ui = require("nicegui", "page").ui
        self._pictures = dict[str, bytes]()
        self._server = self._made(sock, hosts, token)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [sock]}, name="page", daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)
        if not self._server.started:
            raise RuntimeError("the web server has not started")

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join(_END_S)

    @property
    def browsers(self) -> int:
        """How many look."""
        return self._gate.sockets

    @abstractmethod
    def page(self) -> None:
        """What one browser shows, made with `ui`; called for each."""

    def show(self, frames: Mapping[str, np.ndarray]) -> None:
        """The newest pictures, name -> uint8 RGB (height, width, 3): made smaller and encoded while somebody looks, the first always."""
        for name, frame in frames.items():
            if self.browsers or name not in self._pictures:
                self._pictures[name] = jpeg(frame)

    def pictures(self, names: Iterable[str]) -> Any:
        """The element that follows these pictures, for `page`."""
        element = self.ui.html("".join(map(_figure, names)), sanitize=False).classes("cameras")
        self.ui.run_javascript("followAll()")
        return element

    def _made(self, sock: socket.socket, hosts: tuple[str, ...], token: str) -> Any:
        import uvicorn
        from fastapi import FastAPI
        from fastapi.responses import Response

        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

        @app.get("/camera/{name:path}")
        async def camera(name: str) -> Response:
            picture = self._pictures.get(name)
            headers = {"Cache-Control": "no-store"}
            return Response(picture, 200 if picture else 404, headers, "image/jpeg")

        looks: dict[str, Any] = {"title": "gr00t_fast", "dark": None, "tailwind": False, "show_welcome_message": False}
        self.ui.run_with(app, root=self._begin, reconnect_timeout=3.0, message_history_length=0, **looks)
        self._gate = Gate(app, hosts, token, sock.getsockname()[1])
        settings: dict[str, Any] = {"ws_max_size": _MOST_MESSAGE_BYTES, "ws_max_queue": 4, "h11_max_incomplete_event_size": _MOST_MESSAGE_BYTES}
        settings |= {"log_level": "critical", "access_log": False, "server_header": False, "proxy_headers": False, "limit_concurrency": 100}
        return uvicorn.Server(uvicorn.Config(self._gate, lifespan="on", timeout_graceful_shutdown=1, **settings))

    def _begin(self) -> None:
        from nicegui import Client

        if len(Client.instances) > _MOST_PAGES:
            self.ui.label("Too many pages were opened. Close some, wait a minute, and load this one again.")
            return
        self.ui.add_head_html(_SCRIPT)
        self.page()


class Gate:
    """In front of the page: who may come in. An ASGI application."""

    def __init__(self, app: Callable[..., Any], hosts: tuple[str, ...], token: str, port: int) -> None:
        """hosts: what a browser may call this machine. With a token, any IP address is one besides: a foreign site has a name."""
        self._app, self._hosts, self._token, self._cookie = app, hosts, token, f"{_COOKIE}_{port}"
        self.sockets = 0  # browsers that are connected

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            return await self._app(scope, receive, send)
        refused = self._refusal(scope)
        if refused is None and kind == "websocket" and self.sockets >= _MOST_CLIENTS:
            refused = 503, _FULL
        if refused is not None:
            return await _answer(kind, receive, send, *refused)
        if kind == "http" and self._asked_token(scope):
            cookie = f"{self._cookie}={self._token}; HttpOnly; SameSite=Lax; Path=/"
            return await _answer(kind, receive, send, 303, "", ((b"location", b"/"), (b"set-cookie", cookie.encode())))
        if kind == "http" and scope["path"] == "/" and self.sockets >= _MOST_CLIENTS:
            return await _answer(kind, receive, send, 503, _FULL)
        self.sockets += kind == "websocket"
        try:
            await self._app(scope, receive, send)
        finally:
            self.sockets -= kind == "websocket"

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if not self._is_here(host):
            return 403, "This page is not served under that name. Use the address that the run printed."
        if origin is not None and origin != f"http://{host}":
            return 403, "Another site asks: refused."
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
            return 405, "Only the page's own socket changes anything."
        if scope["type"] == "websocket" and origin is None:
            return 403, "A browser says where it comes from (Origin)."
        if self._token and not (self._asked_token(scope) or self._has_cookie(headers.get(b"cookie", ""))):
            return 403, "The token is missing or wrong. Use the whole address that the run printed, with ?token=..."
        return None

    def _is_here(self, host: str) -> bool:
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        name = name.strip("[]").lower()
        if name in (known.lower() for known in self._hosts):
            return True
        try:
            return bool(self._token) and bool(ip_address(name))
        except ValueError:
            return False

    def _asked_token(self, scope: Any) -> bool:
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        return bool(self._token) and secrets.compare_digest(asked.encode(), self._token.encode())

    def _has_cookie(self, text: str) -> bool:
        try:
            held = SimpleCookie(text).get(self._cookie)
        except CookieError:
            return False
        return held is not None and secrets.compare_digest(held.value.encode(), self._token.encode())


_FULL = f"{_MOST_CLIENTS} browsers look at this run already. Close one of them."


async def _answer(kind: str, receive: Any, send: Any, status: int, text: str, more: Sequence[tuple[bytes, bytes]] = ()) -> None:
    if kind == "websocket":
        await receive()
        return await send({"type": "websocket.close", "code": 1008, "reason": text[:100]})
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain; charset=utf-8"), *more]})
    return await send({"type": "http.response.body", "body": text.encode() + b"\n"})


def _figure(camera: str) -> str:
    name, url = html.escape(camera), html.escape(f"/camera/{quote(camera)}")
    return f'<figure><img alt="{name}" data-url="{url}"><figcaption>{name}</figcaption></figure>'


@functools.cache
def _token() -> str:
    """One for the program: a study has a page for each trial, and who was let in once stays in."""
    return secrets.token_urlsafe(16)


def names_of(sock: socket.socket) -> tuple[tuple[str, ...], str, str]:
    """A socket that listens -> what a browser may call this machine, the token that it needs or "", and the address to open."""
    host, port = sock.getsockname()[:2]
    local = host in (HERE, "::1")
    token = "" if local else _token()
    names = (HERE, "localhost", "::1") if local else (socket.gethostname(), f"{socket.gethostname()}.local")
    return names, token, f"http://{_shown(host)}:{port}/" + (f"?token={token}" if token else "")


def _shown(host: str) -> str:
    """What another machine can call this one: of an address that stands for all, the one that has the way out."""
    if host in ("0.0.0.0", "::"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            try:
                sock.connect(("192.0.2.1", 9))  # a documentation address (RFC 5737): nothing is sent
                host = sock.getsockname()[0]
            except OSError:
                host = socket.gethostname()
    return f"[{host}]" if ":" in host else host
