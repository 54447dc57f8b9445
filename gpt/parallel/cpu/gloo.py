"""CPU adapter of Fleet: the Gloo collectives that it calls, imported only by ranks of a job on CPUs.

Fleet's layers and schedules are written for accelerators. Missing on a CPU of Paddle 3.3, and added here:

- a store per group: every Gloo group announces itself in its store under its bare rank, so groups that share a store
  read one another's addresses;
- no timeout: Gloo fails if a rank is 30 seconds late, for instance one that writes a checkpoint; here ranks first
  meet at a barrier (``gpt.parallel.cpu.sockets``);
- the ``*_on_calc_stream`` methods: a CPU has no stream, so they are the synchronous methods;
- asynchronous sends: 1F1B lets both neighbours send before either receives, and Gloo's send waits for the receiver;
  here each direction of each neighbouring pair of stages is a socket with a thread that sends copies;
- the mpu operations without a CPU kernel.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.base import core
from paddle.distributed import collective, fleet, parallel
from paddle.distributed.communication.reduce import _get_reduce_op
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.utils import sequence_parallel_utils

from gpt.parallel.cpu import sockets
from gpt.utils.arrays import view

_stores: list[Any] = []  # they must outlive the groups


def prepare() -> None:
    """Replace, before Fleet starts, how groups are made, and operations without a CPU kernel."""
    dist.ParallelEnv._device_id = 0  # the pipeline layer asks for it, and a CPU build does not set it
    collective._new_process_group_impl = _new_group
    parallel._new_process_group_impl = _new_group
    mp_ops._c_identity = _identity
    mp_ops._mp_allreduce = _all_reduce
    mp_ops._c_softmax_with_cross_entropy = _cross_entropy
    sequence_parallel_utils.all_gather = _gather_rows
    sequence_parallel_utils.reduce_scatter = _reduce_scatter_rows


def link(hcg: Any, *, ring: bool) -> None:
    """Link neighbouring pipeline stages, after Fleet has started; with ``ring`` also the last and the first."""
    group = hcg.get_pipe_parallel_group()
    if group.nranks == 1:
        return
    me, count = group.rank, group.nranks
    beside = {me - 1, me + 1} if not ring else {(me - 1) % count, (me + 1) % count}
    store, name = collective._default_store, f"gpt/link/{group.ranks[0]}"
    links = sockets.links(store, name, me, sorted(beside & set(range(count))))
    group.process_group.outgoing, group.process_group.incoming = links


def _new_group(
    backend: str, store: Any, rank: int, world_size: int, group_name: str, pg_options: Any, group_id: int = 0, **_: Any
) -> _Group:
    """Replaces Paddle's function: make a Gloo group with its own store, when all its ranks have arrived."""
    name = f"gpt/group/{group_id}"
    barrier = sockets.SocketBarrier(store, f"{name}/gate", rank, world_size)
    own = _store(store, name, rank)
    barrier.enter()
    _stores.append(own)
    return _Group(core.ProcessGroupGloo.create(own, rank, world_size, group_id), barrier)


def _store(meeting_point: Any, key: str, rank: int) -> Any:
    """Return a store that the first rank of a group serves and whose address the others look up under ``key``.

    The port stays bound by a socket that does not listen until the server does (both may reuse the address), so no
    other process gets it in between; a server whose port is taken aborts the process. With 0 workers the store waits
    for no rank, so it exists before its address is published.
    """
    if rank == 0:
        host = sockets.own_host()
        with socket.socket() as holder:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind((host, 0))
            port = int(holder.getsockname()[1])
            store = core.TCPStore(host, port, True, 0)
        sockets.publish(meeting_point, key, (host, port))
        return store
    host, port = sockets.find(meeting_point, key)
    return core.TCPStore(host, port, False, 0)


class _Done:
    """A completed task, as Paddle's callers expect one."""

    def wait(self, *timeout: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Return at once."""


COLLECTIVES = frozenset(
    ["all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all", "barrier", "broadcast", "gather", "reduce"]
)


class _Group:
    """A Gloo process group with the methods that Fleet uses on accelerators, behind a barrier."""

    def __init__(self, raw: Any, barrier: sockets.SocketBarrier) -> None:
        self._raw, self._barrier = raw, barrier
        self.outgoing: dict[int, sockets.Sender] = {}  # by rank in this group; for pipelines only
        self.incoming: dict[int, sockets.Receiver] = {}
        self._postponed: list[tuple[Tensor, int]] | None = None

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._raw, name)
        return partial(self._after_barrier, method) if name in COLLECTIVES else method

    def _after_barrier(self, method: Callable[..., Any], *arguments: Any) -> Any:
        self._barrier.enter()
        return method(*arguments)

    def _start_coalescing(self) -> None:
        """Postpone receives to the end of the batch, so that all sends are pending before the first receive waits."""
        self._postponed = []

    def _end_coalescing(self, tasks: Any = None) -> None:
        postponed, self._postponed = self._postponed or [], None
        for tensor, source in postponed:
            self.recv(tensor, source)

    def all_reduce_on_calc_stream(self, tensor: Tensor, op: Any) -> Any:
        return self.all_reduce(tensor, op, True).wait()

    def broadcast_on_calc_stream(self, tensor: Tensor, source: int) -> Any:
        return self.broadcast(tensor, source, True).wait()

    def all_gather_on_calc_stream(self, tensors: list[Tensor], tensor: Tensor) -> Any:
        return self.all_gather(tensors, tensor, True).wait()

    def all_gather_into_tensor_on_calc_stream(self, out: Tensor, tensor: Tensor) -> Any:
        return self.all_gather_into_tensor(out, tensor, True).wait()

    def send(self, tensor: Tensor, to: int, sync: bool = True) -> Any:
        self.outgoing[to].send(view(tensor.contiguous()))
        return _Done()

    def recv(self, tensor: Tensor, source: int, sync: bool = True) -> Any:
        if self._postponed is not None:
            self._postponed.append((tensor, source))
        else:
            self.incoming[source].receive(view(tensor))
        return _Done()

    def send_on_calc_stream(self, tensor: Tensor, to: int) -> Any:
        return self.send(tensor, to)

    def recv_on_calc_stream(self, tensor: Tensor, source: int) -> Any:
        return self.recv(tensor, source)


def _reduce(tensor: Tensor, op: Any, group: Any) -> Tensor:
    group.process_group.all_reduce_on_calc_stream(tensor, _get_reduce_op(op))
    return tensor


class _Identity(PyLayer):  # type: ignore[misc]
    """The identity on a replicated input of split weights; sums its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _reduce(grad.clone(), dist.ReduceOp.SUM, ctx.group)


class _AllReduce(PyLayer):  # type: ignore[misc]
    """Sums partial outputs of split weights; their gradient is replicated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _reduce(x.clone(), dist.ReduceOp.SUM, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()


class _CrossEntropy(PyLayer):  # type: ignore[misc]
    """Cross entropy over a split vocabulary: reduces the maximum, the sum and the label's logit."""

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, labels_M1: Tensor, group: Any) -> Tensor:
        columns = logits_MV.shape[-1]
        top = _reduce(logits_MV.max(-1, keepdim=True), dist.ReduceOp.MAX, group)
        shifted = logits_MV - top
        exps = shifted.exp()
        total = _reduce(exps.sum(-1, keepdim=True), dist.ReduceOp.SUM, group)
        local = labels_M1 - group.rank * columns
        is_local = paddle.logical_and(local >= 0, local < columns)
        local = paddle.where(is_local, local, paddle.zeros_like(local))
        is_local = is_local.astype(logits_MV.dtype)
        label = _reduce(paddle.take_along_axis(shifted, local, -1) * is_local, dist.ReduceOp.SUM, group)
        ctx.save_for_backward(exps / total, local, is_local)
        return total.log() - label

    @staticmethod
    def backward(ctx: Any, grad_M1: Tensor) -> tuple[Tensor, None]:
        probability, local, is_local = ctx.saved_tensor()
        one_hot = paddle.nn.functional.one_hot(local.squeeze(-1), probability.shape[-1]) * is_local
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


def _gather_rows(x: Tensor) -> Tensor:
    """Gather the rows of all mp ranks, in their order."""
    group = fleet.get_hybrid_communicate_group().get_model_parallel_group()
    out = paddle.empty([x.shape[0] * group.nranks, *x.shape[1:]], x.dtype)
    group.process_group.all_gather_into_tensor_on_calc_stream(out, x.contiguous())
    return out


def _reduce_scatter_rows(x: Tensor) -> Tensor:
    """Return this mp rank's rows of the sum: Gloo has no reduce-scatter."""
    group = fleet.get_hybrid_communicate_group().get_model_parallel_group()
    return paddle.split(_reduce(x.clone(), dist.ReduceOp.SUM, group), group.nranks)[group.rank]
