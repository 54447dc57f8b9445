"""Makes Gloo speak what Fleet calls: the one CPU adapter, imported only by ranks of a job on CPUs.

Fleet's layers and schedules are written for accelerators. What they miss on a CPU of Paddle 3.3, and find here:

- groups that do not mix up their addresses: every Gloo group announces itself in its store under its bare rank, so
  groups that share a store read one another's addresses; here each has a store of its own;
- the ``*_on_calc_stream`` verbs: a CPU has no stream, so the synchronous verbs are them;
- sends that do not wait: 1F1B lets both neighbours send before either receives, and Gloo's send waits for the
  receiver; a thread per link sends a copy, in order. Gloo numbers the messages of a group, not those of a pair, so
  each direction of each neighbouring pair is a group of its own;
- the mpu operations without a CPU kernel.
"""

from __future__ import annotations

import os
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.base import core
from paddle.distributed import collective
from paddle.distributed.communication.reduce import _get_reduce_op
from paddle.distributed.fleet.layers.mpu import mp_ops

_stores: list[Any] = []  # they must outlive the groups


def prepare() -> None:
    """Before Fleet starts: how groups are made, and operations with a CPU kernel."""
    dist.ParallelEnv._device_id = 0  # the pipeline layer asks for it, and a CPU build does not set it
    collective._new_process_group_impl = _new_group
    mp_ops._c_identity = _identity
    mp_ops._mp_allreduce = _all_reduce
    mp_ops._c_softmax_with_cross_entropy = _cross_entropy


def link(hcg: Any, *, ring: bool) -> None:
    """After Fleet has started: links between neighbouring stages; ``ring`` also from the last to the first."""
    me = dist.get_rank()
    for stages in hcg.topology().get_comm_list("pipe"):
        count = len(stages)
        pairs = [(i, i + 1) for i in range(count - 1)]
        if ring and count > 2:
            pairs.append((count - 1, 0))
        for a, b in [*pairs, *((b, a) for a, b in pairs)]:
            group = dist.new_group(sorted([stages[a], stages[b]]))  # every rank takes part in naming every group
            pipe = hcg.get_pipe_parallel_group().process_group
            if me == stages[a]:
                pipe.outgoing[b] = _Sender(group, stages[b])
            elif me == stages[b]:
                pipe.incoming[a] = (group.process_group, group.get_group_rank(stages[a]))


def _new_group(
    backend: str, store: Any, rank: int, world_size: int, group_name: str, pg_options: Any, group_id: int = 0, **_: Any
) -> _Group:
    """In place of Paddle's: a Gloo group with a store of its own."""
    own = _store(store, f"gpt/group/{group_id}", rank)
    _stores.append(own)
    return _Group(core.ProcessGroupGloo.create(own, rank, world_size, group_id))


def _store(meeting_point: Any, key: str, rank: int) -> Any:
    """A store that the first rank of a group serves and whose address the others find under ``key``.

    The port stays bound by a socket that does not listen until the server does (both may reuse the address), so no
    other process gets it in between; a server whose port is taken aborts the process. The store is told to wait for
    nobody (0 workers), so it is there before its address is given away.
    """
    if rank == 0:
        host = os.environ["PADDLE_CURRENT_ENDPOINT"].rsplit(":", 1)[0]
        with socket.socket() as holder:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind((host, 0))
            port = int(holder.getsockname()[1])
            store = core.TCPStore(host, port, True, 0)
        meeting_point.set(key, f"{host}:{port}".encode())
        return store
    host, port_text = bytes(meeting_point.get(key)).decode().rsplit(":", 1)
    return core.TCPStore(host, int(port_text), False, 0)


class _Done:
    """A task that is over, as Paddle's callers expect one."""

    def wait(self, *timeout: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing is under way."""


class _Sender:
    """One direction of a neighbouring pair: sends copies on a thread, in order."""

    def __init__(self, group: Any, to: int) -> None:
        self._group, self._to = group.process_group, group.get_group_rank(to)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"send to {to}")
        self._last: Future[None] | None = None

    def send(self, tensor: Tensor) -> _Done:
        if self._last and self._last.done():
            self._last.result()  # what went wrong with it is said now
        copy = tensor.detach().clone()
        self._last = self._thread.submit(lambda: self._group.send(copy, self._to, True).wait())
        return _Done()


class _Group:
    """A Gloo process group with the verbs that Fleet uses on accelerators."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.outgoing: dict[int, _Sender] = {}  # by rank in this group; for pipelines only
        self.incoming: dict[int, tuple[Any, int]] = {}
        self._postponed: list[tuple[Tensor, int]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def _start_coalescing(self) -> None:
        """What follows counts as one: all sends are under way before the first receive waits."""
        self._postponed = []

    def _end_coalescing(self, tasks: Any = None) -> None:
        postponed, self._postponed = self._postponed or [], None
        for tensor, source in postponed:
            self.recv(tensor, source)

    def all_reduce_on_calc_stream(self, tensor: Tensor, op: Any) -> Any:
        return self._raw.all_reduce(tensor, op, True).wait()

    def broadcast_on_calc_stream(self, tensor: Tensor, source: int) -> Any:
        return self._raw.broadcast(tensor, source, True).wait()

    def all_gather_on_calc_stream(self, tensors: list[Tensor], tensor: Tensor) -> Any:
        return self._raw.all_gather(tensors, tensor, True).wait()

    def all_gather_into_tensor_on_calc_stream(self, out: Tensor, tensor: Tensor) -> Any:
        return self._raw.all_gather_into_tensor(out, tensor, True).wait()

    def send(self, tensor: Tensor, to: int, sync: bool = True) -> Any:
        sender = self.outgoing.get(to)
        return sender.send(tensor) if sender else self._raw.send(tensor, to, sync)

    def recv(self, tensor: Tensor, source: int, sync: bool = True) -> Any:
        if self._postponed is not None:
            self._postponed.append((tensor, source))
            return _Done()
        group, rank = self.incoming.get(source, (self._raw, source))
        group.recv(tensor, rank, True).wait()
        return _Done()

    def send_on_calc_stream(self, tensor: Tensor, to: int) -> Any:
        return self.send(tensor, to)

    def recv_on_calc_stream(self, tensor: Tensor, source: int) -> Any:
        return self.recv(tensor, source)


def _reduce(tensor: Tensor, op: Any, group: Any) -> Tensor:
    group.process_group.all_reduce_on_calc_stream(tensor, _get_reduce_op(op))
    return tensor


class _Identity(PyLayer):  # type: ignore[misc]
    """A replicated input of split weights: its gradients add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _reduce(grad.clone(), dist.ReduceOp.SUM, ctx.group)


class _AllReduce(PyLayer):  # type: ignore[misc]
    """Partial outputs of split weights add up: their gradient is replicated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _reduce(x.clone(), dist.ReduceOp.SUM, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()


class _CrossEntropy(PyLayer):  # type: ignore[misc]
    """Over a vocabulary whose columns are shared out: the maximum, the sum and the label's logit are exchanged."""

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, labels_M1: Tensor, group: Any) -> Tensor:
        columns = logits_MV.shape[-1]
        top = _reduce(logits_MV.max(-1, keepdim=True), dist.ReduceOp.MAX, group)
        shifted = logits_MV - top
        exps = shifted.exp()
        total = _reduce(exps.sum(-1, keepdim=True), dist.ReduceOp.SUM, group)
        local = labels_M1 - group.rank * columns
        here = paddle.logical_and(local >= 0, local < columns)
        local = paddle.where(here, local, paddle.zeros_like(local))
        here = here.astype(logits_MV.dtype)
        label = _reduce(paddle.take_along_axis(shifted, local, -1) * here, dist.ReduceOp.SUM, group)
        ctx.save_for_backward(exps / total, local, here)
        return total.log() - label

    @staticmethod
    def backward(ctx: Any, grad_M1: Tensor) -> tuple[Tensor, None]:
        probability, local, here = ctx.saved_tensor()
        one_hot = paddle.nn.functional.one_hot(local.squeeze(-1), probability.shape[-1]) * here
        return (probability - one_hot) * grad_M1, None


def _identity(tensor: Tensor, group: Any = None, skip_c_identity_dynamic: bool = False) -> Tensor:
    return _Identity.apply(tensor, group)


def _all_reduce(
    tensor: Tensor,
    op: Any = None,
    group: Any = None,
    use_calc_stream: bool = True,
    use_model_parallel: bool = True,
    skip_c_identity_dynamic: bool = False,
) -> Tensor:
    return _AllReduce.apply(tensor, group)


def _cross_entropy(
    logits: Tensor, label: Tensor, group: Any = None, return_softmax: bool = False, ignore_index: int = -100
) -> Tensor:
    return _CrossEntropy.apply(logits, label, group)
