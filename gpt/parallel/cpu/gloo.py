"""Makes Gloo speak what Fleet calls: the one CPU adapter, imported only by ranks of a job on CPUs.

Fleet's layers and schedules are written for accelerators. What they miss on a CPU of Paddle 3.3, and find here:

- groups that do not mix up their addresses: every Gloo group announces itself in its store under its bare rank, so
  groups that share a store read one another's addresses; here each has a store of its own;
- patience: Gloo gives up on a rank that is 30 seconds late, which one that writes a checkpoint may be; here ranks
  first meet at a gate that waits (``gpt.parallel.cpu.sockets``);
- the ``*_on_calc_stream`` verbs: a CPU has no stream, so the synchronous verbs are them;
- sends that do not wait: 1F1B lets both neighbours send before either receives, and Gloo's send waits for the
  receiver; here each direction of each neighbouring pair of stages is a socket with a thread that sends copies;
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
    """Before Fleet starts: how groups are made, and operations with a CPU kernel."""
    dist.ParallelEnv._device_id = 0  # the pipeline layer asks for it, and a CPU build does not set it
    collective._new_process_group_impl = _new_group
    parallel._new_process_group_impl = _new_group
    mp_ops._c_identity = _identity
    mp_ops._mp_allreduce = _all_reduce
    mp_ops._c_softmax_with_cross_entropy = _cross_entropy
    sequence_parallel_utils.all_gather = _gather_rows
    sequence_parallel_utils.reduce_scatter = _reduce_scatter_rows


def link(hcg: Any, *, ring: bool) -> None:
    """After Fleet has started: links between neighbouring stages; ``ring`` also from the last to the first."""
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
    """In place of Paddle's: a Gloo group with a store of its own, made when all its ranks are there."""
    name = f"gpt/group/{group_id}"
    gate = sockets.SocketBarrier(store, f"{name}/gate", rank, world_size)
    own = _store(store, name, rank)
    gate.enter()
    _stores.append(own)
    return _Group(core.ProcessGroupGloo.create(own, rank, world_size, group_id), gate)


def _store(meeting_point: Any, key: str, rank: int) -> Any:
    """A store that the first rank of a group serves and whose address the others find under ``key``.

    The port stays bound by a socket that does not listen until the server does (both may reuse the address), so no
    other process gets it in between; a server whose port is taken aborts the process. The store is told to wait for
    nobody (0 workers), so it is there before its address is given away.
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
    """A task that is over, as Paddle's callers expect one."""

    def wait(self, *timeout: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing is under way."""


COLLECTIVES = frozenset(
    ["all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all", "barrier", "broadcast", "gather", "reduce"]
)


class _Group:
    """A Gloo process group with the verbs that Fleet uses on accelerators, behind a gate."""

    def __init__(self, raw: Any, gate: sockets.SocketBarrier) -> None:
        self._raw, self._gate = raw, gate
        self.outgoing: dict[int, sockets.Sender] = {}  # by rank in this group; for pipelines only
        self.incoming: dict[int, sockets.Receiver] = {}
        self._postponed: list[tuple[Tensor, int]] | None = None

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._raw, name)
        return partial(self._together, verb) if name in COLLECTIVES else verb

    def _together(self, verb: Callable[..., Any], *arguments: Any) -> Any:
        self._gate.enter()
        return verb(*arguments)

    def _start_coalescing(self) -> None:
        """What follows counts as one: all sends are under way before the first receive waits."""
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


def _gather_rows(x: Tensor) -> Tensor:
    """All mp ranks' rows, one rank's after the other's."""
    group = fleet.get_hybrid_communicate_group().get_model_parallel_group()
    out = paddle.empty([x.shape[0] * group.nranks, *x.shape[1:]], x.dtype)
    group.process_group.all_gather_into_tensor_on_calc_stream(out, x.contiguous())
    return out


def _reduce_scatter_rows(x: Tensor) -> Tensor:
    """This mp rank's rows of the sum: Gloo has no reduce-scatter."""
    group = fleet.get_hybrid_communicate_group().get_model_parallel_group()
    return paddle.split(_reduce(x.clone(), dist.ReduceOp.SUM, group), group.nranks)[group.rank]
