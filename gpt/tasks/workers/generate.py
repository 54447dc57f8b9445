"""Sample: continue prompts, one token at a time, with cached keys and values."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import paddle.distributed as dist

from gpt.config.sampling import Sampling
from gpt.data import tokenizer
from gpt.inference import prompts as inference_prompts
from gpt.inference.generator import Generator
from gpt.inference.types import Completion, TextDelta
from gpt.parallel import pipeline_comm
from gpt.parallel.topology import Topology
from gpt.runs.run_dir import Job
from gpt.train.trainer import Trainer
from gpt.utils import heartbeat
from gpt.utils.console import say
from gpt.utils.launch_env import WorkerEnv
from gpt.utils.signals import Signals
from gpt.utils.terminal import Terminal

IDLE_SECONDS = 5.0  # after which ranks that wait for a prompt hear that there is none yet


def run(job: Job, signals: Signals) -> int:
    """Continue the prompts that the job names, or those that are typed; returns the exit code."""
    topology = Topology.initialize(job.config)
    writer = Generator.of(job, topology)
    terminal = Terminal() if topology.rank == 0 and WorkerEnv.from_env(os.environ).terminal else None
    if job.config.generate.interactive:
        _converse(job, writer, topology, terminal, signals)
    else:
        _write(job, writer, topology, terminal, signals)
    return 128 + signals.received if signals.received else 0


def _write(job: Job, writer: Generator, topology: Topology, terminal: Terminal | None, signals: Signals) -> None:
    """Continue all prompts, some side by side, the replicas sharing them out."""
    settings = job.config.generate
    prompts, sampling = inference_prompts.read(settings), Sampling.of(settings, job.config.seed)
    live = terminal if len(prompts) == 1 and sampling.num_beams == sampling.num_return_sequences == 1 else None
    if live:
        live.show(f"--- sample (step {writer.step:,}) ---\n{prompts[0]}")
    on_piece, first = _Shown(live), 0
    with _Results(job, writer.step, topology) as results:
        for completions in in_batches(
            writer, topology, prompts, sampling, settings.batch_size, on_piece, lambda: not signals.received
        ):
            if live:
                live.show("\n")
            results.take(prompts[first : first + len(completions)], completions, first, show=live is None)
            first += len(completions)


def in_batches(
    writer: Generator,
    topology: Topology,
    prompts: list[str],
    sampling: Sampling,
    size: int,
    on_piece: Callable[[TextDelta], None],
    keep_going: Callable[[], bool],
) -> Iterator[list[list[Completion]]]:
    """Texts for ``size`` prompts per replica at a time, on all ranks, as long as ``keep_going`` says so."""
    for first in range(0, len(prompts), size * topology.replicas):
        if not keep_going():
            return
        batch = prompts[first : first + size * topology.replicas]
        mine = [writer.encode(prompt) for prompt in batch[topology.replica :: topology.replicas]]
        yield _gathered(topology, writer.write(mine, sampling, on_piece, keep_going) if mine else [])


def _gathered(topology: Topology, mine: list[list[Completion]]) -> list[list[Completion]]:
    """What all replicas have written, in the order of their prompts."""
    if topology.replicas == 1:
        return mine
    gathered: list[Any] = []
    dist.all_gather_object(gathered, (topology.replica, mine))
    by_replica = dict(gathered)
    count = sum(len(texts) for texts in by_replica.values())
    return [by_replica[i % topology.replicas][i // topology.replicas] for i in range(count)]


class _Results:
    """Shows texts, and puts them into ``samples.jsonl`` and ``generate.output``. The first rank alone does."""

    def __init__(self, job: Job, step: int, topology: Topology) -> None:
        self._job = job
        self._step = step
        self._here = topology.rank == 0
        output = job.config.generate.output
        self._final = Path(output) if output else None
        self._part = self._final.with_name(f"{self._final.name}.part") if self._final else None
        if self._part and self._here:
            self._part.unlink(missing_ok=True)

    def __enter__(self) -> _Results:
        return self

    def take(self, prompts: list[str], completions: list[list[Completion]], first: int, *, show: bool) -> None:
        """Texts of some prompts, of which the first has number ``first``."""
        if not self._here:
            return
        rows = list(_rows(prompts, completions, self._step))
        record(self._job.run_dir / "samples.jsonl", rows)
        if self._part:
            record(self._part, [{"number": first + i, **row} for i, row in enumerate(rows)])
        for number, row in enumerate(rows if show else (), start=1):
            say(f"--- sample {number} of {len(rows)} (step {self._step:,}) ---")
            say(f"{row['prompt']}{row['text']}")

    def __exit__(self, kind: object, *rest: object) -> None:
        if self._part and self._final and self._here and kind is None:
            os.replace(self._part, self._final)
            say(f"written: {self._final}")


def _rows(prompts: list[str], completions: list[list[Completion]], step: int) -> Iterator[dict[str, Any]]:
    for prompt, texts in zip(prompts, completions, strict=True):
        for text in texts:
            about = {"tokens": len(text.tokens), "finish": text.finish, "logprob": sum(text.logprobs)}
            yield {"step": step, "prompt": prompt, "text": text.text, **about}


def record(file: Path, rows: list[dict[str, Any]]) -> None:
    """Append JSON lines."""
    with open(file, "a", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _converse(job: Job, writer: Generator, topology: Topology, terminal: Terminal | None, signals: Signals) -> None:
    """Continue every line that is typed, until the input ends."""
    sampling, number = Sampling.of(job.config.generate, job.config.seed), 0
    if terminal:
        terminal.show(f"step {writer.step:,}; type the beginning of a text, Ctrl-D ends\n")
    while (prompt := _next_prompt(topology, terminal, signals)) is not None:
        tokens = writer.encode(prompt)
        if not 0 < len(tokens) <= writer.positions:
            if terminal:
                terminal.show(f"that is {len(tokens):,} tokens; from 1 to {writer.positions:,} can be continued\n")
            continue
        if terminal and sampling.num_beams == sampling.num_return_sequences == 1:
            terminal.show(prompt)
        varied = replace(sampling, seed=sampling.seed + number)  # the same line again: another text
        number += 1
        on_piece = _Shown(terminal)
        texts = writer.write([tokens], varied, on_piece, lambda: not _stopped(topology, signals))
        if terminal:
            rest = "" if on_piece.shown else "\n".join(f"{prompt}{text.text}" for text in texts[0])
            terminal.show(f"{rest}\n\n")
            record(job.run_dir / "samples.jsonl", list(_rows([prompt], texts, writer.step)))


class _Shown:
    """Shows pieces of the first text; of several texts they would be mixed up."""

    def __init__(self, terminal: Terminal | None) -> None:
        self._terminal = terminal
        self.shown = False

    def __call__(self, piece: TextDelta) -> None:
        heartbeat.beat(piece.tokens, "generate")
        if self._terminal and piece.sequence == 0:
            self.shown = True
            self._terminal.show(piece.text)


def _stopped(topology: Topology, signals: Signals) -> bool:
    """Whether rank 0 has received a signal: ranks that work together stop together."""
    return bool(pipeline_comm.broadcast_object(topology, bool(signals.received)))


def _next_prompt(topology: Topology, terminal: Terminal | None, signals: Signals) -> str | None:
    """Return the next typed line on all ranks; None at the end of the input or after a signal."""
    prompt: str | None = ""
    while prompt == "":
        if terminal:
            terminal.show("> ")
        line: list[str | None] = []
        while not line:
            heartbeat.beat(0, "wait for a prompt")
            if terminal:
                line = _read_line(terminal, signals, IDLE_SECONDS if topology.hcg else 0.5)
            line = pipeline_comm.broadcast_object(topology, line)
        (prompt,) = line
    if terminal and prompt is None:
        terminal.show("\n")
    return prompt


def _read_line(terminal: Terminal, signals: Signals, seconds: float) -> list[str | None]:
    """Return the line that is typed within that time, if any; None in its place at the end."""
    try:
        line = None if signals.received else terminal.read_line(seconds)
        return [line] if line is not None or signals.received else []
    except EOFError:
        return [None]


def sample_text(job: Job, engine: Trainer, step: int) -> bool:
    """The sample that closes a training run; whether there is one."""
    if job.data.tokenizer is None:
        say("no sample: the data has no tokenizer (data.tokenizer=.../tokenizer.json)")
        return False
    settings = job.config.generate
    writer = Generator(engine.model, tokenizer.open_encoder(Path(job.data.tokenizer)), step)
    prompt = writer.encode(settings.prompt)
    if not 0 < len(prompt) <= writer.positions:
        say(f"no sample: the prompt has {len(prompt):,} tokens, the model {writer.positions:,} positions")
        return False
    sampling = Sampling.of(settings, job.config.seed)
    rows = list(_rows([settings.prompt], writer.write([prompt], sampling), step))
    record(job.run_dir / "samples.jsonl", rows)
    say(f"--- sample (step {step:,}) ---\n{settings.prompt}{rows[0]['text']}\n---")
    return True
