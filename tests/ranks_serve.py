"""What tests of ``task=serve`` run on every rank; see ``ranks``."""

from __future__ import annotations

import dataclasses
import threading
from signal import Signals as Signal
from typing import Any

from served import Heard, Judge

from gpt.config.derived import typed
from gpt.config.sampling import Sampling
from gpt.inference import logprobs
from gpt.inference.server.request_queue import GenerationRequest, QueuedRequest, RequestQueue
from gpt.model.gpt import GPT
from gpt.parallel.topology import Topology
from gpt.tasks.workers import serve as tasks_serve


def serve(config: dict[str, Any], texts: list[list[int]]) -> dict[str, Any]:
    """What ``_served`` says, without and with a cut, and what a model's scores of texts are."""
    topology = Topology.initialize(typed(config))
    served = [_served(topology, cut) for cut in (False, True)]
    model = GPT(typed(config), topology)
    model.initialise()
    model.eval()
    return {"served": served, "scores": [dataclasses.astuple(s) for s in logprobs.score(model, texts)]}


def _served(topology: Topology, cut: bool) -> dict[str, Any]:
    """What this rank wrote for the first one's three clients, what those were told, and the exit code.

    The second client leaves after four tokens, the third wants scores, a signal comes when all are answered; with
    ``cut`` it comes during the first request, which has no time to finish.
    """
    tasks_serve.IDLE_SECONDS, tasks_serve.FINISH_SECONDS = 0.3, 0.0
    writer, heard, told, written = Judge(), Heard(), [], []
    desk = RequestQueue(9) if topology.rank == 0 else None
    if desk:
        wish = GenerationRequest([[97, 98]], Sampling(max_new_tokens=10))
        orders = [QueuedRequest(w, told.append) for w in (wish, wish, dataclasses.replace(wish, scores=True))]
        desk.open()
        for order in orders:
            desk.put(order)

        def before(number: int) -> None:
            if number == 4 and len(writer.asked) == 2:
                desk.leave(orders[1])
            if number == 4 and cut:
                heard.received = Signal.SIGTERM

        writer.before = before
        if not cut:
            threading.Timer(1.0, lambda: setattr(heard, "received", Signal.SIGINT)).start()
    write = writer.write

    def counted(*arguments: Any) -> Any:
        texts = write(*arguments)
        written.append(writer.written)
        return texts

    writer.write = counted  # type: ignore[method-assign]
    code = tasks_serve.Loop(topology, writer, heard, desk).run()  # type: ignore[arg-type]
    return {"written": written, "told": [type(news).__name__ for news in told], "code": code}
