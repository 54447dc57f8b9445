"""The address of ``task=serve``, checked before a model is loaded."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket

from gpt.config.task_schemas import Serve
from gpt.utils.errors import UserError

PACKAGES = ("pydantic", "starlette", "uvicorn")


def problems(settings: Serve) -> list[str]:
    """Return the problems of a server on this host: packages, the key, the address."""
    problems = []
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        problems.append(f"task=serve needs the packages {', '.join(missing)}: pip install 'gpt-runner[serve]'")
    if settings.api_key_env is not None and not os.environ.get(settings.api_key_env):
        problems.append(
            f"serve.api_key_env={settings.api_key_env}: there is no such environment variable, or it is empty"
        )
    try:
        bind(settings).close()
    except UserError as error:
        problems.append(str(error))
    return problems


def bind(settings: Serve) -> socket.socket:
    """Bind a socket to the address.

    Raises:
        UserError: the port is taken or not allowed, or the host unknown.
    """
    place = f"serve.host={settings.host} serve.port={settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"{place}: no such host ({error})") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not held up by connections that just ended
        listener.bind(address)
        listener.listen(128)  # until it listens, another program could bind the port too
    except OSError as error:
        listener.close()
        # The system's own words for a taken port make a launcher try the whole job again.
        taken = isinstance(error, OSError) and error.errno == 98
        why = "another program listens there" if taken else f"{error.strerror}"
        raise UserError(f"{place}: {why}; choose another serve.port=..., or 0 for any that is free") from error
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Return whether only this machine can reach it."""
    return ipaddress.ip_address(str(listener.getsockname()[0]).partition("%")[0]).is_loopback


def url(listener: socket.socket) -> str:
    """Return the address for a client on this machine."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"
