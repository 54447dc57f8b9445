"""Plain sockets between ranks on CPUs: a barrier of a group, and links that transfer arrays in order.

Unlike Gloo they have no timeout, and the end of a rank is noticed at once: its sockets close.
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
    """Return the address under which the other ranks reach this one."""
    return os.environ["PADDLE_CURRENT_ENDPOINT"].rsplit(":", 1)[0]


def publish(store: Any, key: str, address: Address) -> None:
    """Store an address for other ranks."""
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
    """Return a connection and the rank that it is from."""
    connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    rank = bytearray(4)
    _fill(connection, memoryview(rank))
    return connection, int.from_bytes(rank, "little")


def _connect(store: Any, key: str, me: int) -> socket.socket:
    connection = socket.create_connection(find(store, key))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(me.to_bytes(4, "little"))
    return connection


def _fill(connection: socket.socket, memory: memoryview) -> None:
    """Receive as many bytes as ``memory`` has.

    Raises:
        ConnectionError: the other side has ended.
    """
    done = 0
    while done < len(memory):
        count = connection.recv_into(memory[done:])
        if count == 0:
            raise ConnectionError("the connection to a peer rank was lost")
        done += count


class SocketBarrier:
    """Barrier of a group: each rank sends a byte to the first, which answers when it has all.

    Args:
        store: where addresses are exchanged.
        key: of this barrier.
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
        """Wait until every rank of the group has entered.

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
        """Close the connections; the next ``enter`` of others raises."""
        for connection in (*self._others, *filter(None, [self._first])):
            connection.close()


class Sender:
    """The sending end of a link: a thread sends copies in order, so ``send`` does not wait for the receiver."""

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
        """Send what is pending, then close the link."""
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
        """Close the link."""
        self._connection.close()


def links(store: Any, name: str, me: int, peers: list[int]) -> tuple[dict[int, Sender], dict[int, Receiver]]:
    """Open a link to and one from each peer; all peers call it together.

    Args:
        store: where addresses are exchanged.
        name: of the group in which ``me`` and ``peers`` are ranks.
        me: this rank.
        peers: the ranks to link with.
    """
    with _serve(store, f"{name}/{me}") as server:
        outgoing = {peer: Sender(_connect(store, f"{name}/{peer}", me)) for peer in peers}
        arrived = dict(_accept(server)[::-1] for _ in peers)
    return outgoing, {peer: Receiver(connection) for peer, connection in arrived.items()}
