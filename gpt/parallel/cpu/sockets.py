"""Plain sockets between ranks on CPUs: a gate where a group meets, and links that carry arrays in order.

Unlike Gloo they wait for as long as it takes, and a rank that has ended is noticed at once: its sockets close.
Addresses are exchanged through Paddle's default store.
"""

from __future__ import annotations

import os
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from gpt.utils.arrays import Array

Address = tuple[str, int]


def own_host() -> str:
    """The address under which the other ranks know this one."""
    return os.environ["PADDLE_CURRENT_ENDPOINT"].rsplit(":", 1)[0]


def publish(store: Any, key: str, address: Address) -> None:
    """Let others find an address."""
    store.set(key, f"{address[0]}:{address[1]}".encode())


def find(store: Any, key: str) -> Address:
    """Wait for an address."""
    host, port = bytes(store.get(key)).decode().rsplit(":", 1)
    return host, int(port)


def _serve(store: Any, key: str) -> socket.socket:
    server = socket.create_server((own_host(), 0), backlog=4096)
    publish(store, key, server.getsockname()[:2])
    return server


def _accept(server: socket.socket) -> tuple[socket.socket, int]:
    """A connection, and who it is from."""
    connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    who = bytearray(4)
    _fill(connection, memoryview(who))
    return connection, int.from_bytes(who, "little")


def _connect(store: Any, key: str, me: int) -> socket.socket:
    connection = socket.create_connection(find(store, key))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(me.to_bytes(4, "little"))
    return connection


def _fill(connection: socket.socket, memory: memoryview) -> None:
    """Receive exactly as much as fits.

    Raises:
        ConnectionError: the other side has ended.
    """
    done = 0
    while done < len(memory):
        count = connection.recv_into(memory[done:])
        if count == 0:
            raise ConnectionError("a rank that this one works with has ended")
        done += count


class SocketBarrier:
    """Lets the ranks of a group go on together: each tells the first one that it is there, which lets all go.

    Args:
        store: where addresses are exchanged.
        key: of this gate.
        rank: in the group.
        size: of the group.
    """

    def __init__(self, store: Any, key: str, rank: int, size: int) -> None:
        if rank == 0:
            with _serve(store, key) as server:
                self._others = [_accept(server)[0] for _ in range(size - 1)]
            self._first = None
        else:
            self._others, self._first = [], _connect(store, key, rank)
        self._token = bytearray(1)

    def enter(self) -> None:
        """Return when every rank of the group has called it.

        Raises:
            ConnectionError: a rank has ended.
        """
        token = memoryview(self._token)
        if self._first:
            self._first.sendall(token)
            _fill(self._first, token)
        for other in self._others:
            _fill(other, token)
        for other in self._others:
            other.sendall(token)

    def close(self) -> None:
        """Leave for good; the others hear of it when they next enter."""
        for connection in (*self._others, *filter(None, [self._first])):
            connection.close()


class Sender:
    """The sending end of a link: copies go out on a thread, in order, so ``send`` does not wait for the other side."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="send")
        self._last: Future[None] | None = None

    def send(self, array: Array) -> None:
        """Send a contiguous array.

        Raises:
            OSError: an earlier one could not be sent.
        """
        if self._last and self._last.done():
            self._last.result()
        self._last = self._thread.submit(self._connection.sendall, array.tobytes())

    def close(self) -> None:
        """Send what is under way, and end."""
        self._thread.shutdown()
        self._connection.close()


class Receiver:
    """The receiving end of a link."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def receive(self, into: Array) -> None:
        """Wait for an array of exactly this size.

        Raises:
            ConnectionError: the other side has ended.
        """
        _fill(self._connection, into.reshape(-1).view("uint8").data)

    def close(self) -> None:
        """End the link."""
        self._connection.close()


def links(store: Any, name: str, me: int, peers: list[int]) -> tuple[dict[int, Sender], dict[int, Receiver]]:
    """A link to and one from each of some peers, which do the same.

    Args:
        store: where addresses are exchanged.
        name: of the group that ``me`` and ``peers`` are numbers in.
        me: this rank.
        peers: the others.
    """
    with _serve(store, f"{name}/{me}") as server:
        outgoing = {peer: Sender(_connect(store, f"{name}/{peer}", me)) for peer in peers}
        arrived = dict(_accept(server)[::-1] for _ in peers)
    return outgoing, {peer: Receiver(connection) for peer, connection in arrived.items()}
