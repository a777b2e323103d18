"""Sockets to listen on, for addresses as ZeroMQ writes them."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat

from gr00t_fast.errors import ServerError

ACCEPTED_AT_ONCE = 16  # by the event loop, before it turns to its clients again: asyncio takes this from the backlog that it is told of
_BACKLOG = 512  # connections that have said nothing yet, or wait for the event loop; where there are more, an honest one tries again after a second
# Connections to machines that vanished without closing them are noticed after 25 s. One that says nothing is the kernel's until then: clients of
# ZeroMQ and of HTTP speak first.
_OPTIONS = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_DEFER_ACCEPT": 10}


def numeric_host(host: str, port: int) -> tuple[socket.AddressFamily, str]:
    """Family and numeric address of a host to bind (`*` means all). Raises ServerError when the name is unknown."""
    if not 0 <= port <= 65535:
        raise ServerError(f"port must be from 0 to 65535, got {port}.")
    try:
        family, _, _, _, address = socket.getaddrinfo("0.0.0.0" if host == "*" else host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ServerError(
            f"cannot serve on host '{host}', port {port}: {error}. Use an address of this machine: 127.0.0.1, or 0.0.0.0 for all."
        ) from error
    return family, str(address[0])


def check_port_free(host: str, port: int) -> None:
    """Raises ServerError when nothing can listen there; asked before minutes are spent on loading."""
    listen_on_tcp(host, port)[0].close()


def listen_on_tcp(host: str, port: int) -> tuple[socket.socket, str]:
    """A listening socket and its `address:port`, numeric and with brackets around IPv6. Port 0 picks a free one. Raises ServerError."""
    family, address = numeric_host(host, port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just left is free
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # accepted connections inherit these
        for name, value in _OPTIONS.items():
            if hasattr(socket, name):  # Linux has all of them
                listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        listener.bind((address, port))
        _listen(listener)
    except OSError as error:
        listener.close()
        raise ServerError(f"cannot listen on {host}:{port}: {error.strerror}. Another server may be running there; choose another --port.") from error
    return listener, f"[{address}]:{listener.getsockname()[1]}" if ":" in address else f"{address}:{listener.getsockname()[1]}"


def listen_on(address: str) -> tuple[socket.socket, str]:
    """A listening socket and its address, for `tcp://HOST:PORT` (`*` for all hosts, or a free port) or `ipc://PATH` (`@name`: Linux's abstract
    names). Raises ServerError."""
    transport, _, place = address.partition("://")
    if transport == "tcp" and ":" in place:
        host, _, port = place.rpartition(":")
        if port == "*" or (port.isascii() and port.isdigit()):
            listener, numeric = listen_on_tcp(host.strip("[]"), 0 if port == "*" else int(port[:6]))
            return listener, f"tcp://{numeric}"
    if transport != "ipc" or not place:
        raise ServerError(f"cannot listen on '{address}'. Expected tcp://HOST:PORT or ipc://PATH.")
    path = f"\0{place[1:]}" if place.startswith("@") else place
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not place.startswith("@"):
            _remove_stale(path)
        listener.bind(path)
        _listen(listener)
    except OSError as error:
        listener.close()
        raise ServerError(f"cannot listen on {address}: {error.strerror or error}. Another server may be running there.") from error
    return listener, address


def is_local(address: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    if not address.startswith("tcp://") and not address.startswith("http://"):
        return True
    return ipaddress.ip_address(address.partition("://")[2].rpartition(":")[0].strip("[]").split("%")[0]).is_loopback


def widen(listener: socket.socket) -> None:
    """The full backlog again, after asyncio has set its own."""
    listener.listen(_BACKLOG)


def _listen(listener: socket.socket) -> None:
    listener.listen(_BACKLOG)
    listener.setblocking(False)


def _remove_stale(path: str) -> None:
    """The file of a socket on which nobody listens any more. Raises OSError when somebody does."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(path) == 0:
                    raise OSError("somebody listens there already")
            os.unlink(path)
