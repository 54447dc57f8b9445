"""The typed schema of the sections that belong to single tasks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

BYTE_ALPHABET = 256  # of a byte-level BPE; one more for end-of-text


class Section:
    """What the rules ask the section of a command's task."""

    def problems(self) -> Iterator[str]:
        """Yield violations of rules between its keys."""
        yield from ()

    def unattended_problems(self, place: str) -> Iterator[str]:
        """Yield what needs a terminal or a client, which a job at ``place`` does not have."""
        yield from ()


class EvaluateKind(Enum):
    """What is measured."""

    split = "split"  # the loss on a split of token files
    text = "text"  # the loss on a file of raw text, tokenised with the checkpoint's tokenizer
    cloze = "cloze"  # how often the last word of a passage is found


class Detokenizer(Enum):
    """What is undone in a text that was taken apart for counting words."""

    none = "none"
    wikitext = "wikitext"


@dataclass(frozen=True)
class Evaluate(Section):
    """Of ``task=evaluate``."""

    kind: EvaluateKind = MISSING
    split: Split = MISSING  # of kind=split
    path: str | None = None  # of kind=text and kind=cloze: a file; .jsonl: a document per line
    json_key: str = MISSING  # where in such a line the text is
    detokenizer: Detokenizer = MISSING  # of kind=text
    stride: int | None = None  # tokens that are new in each window; None: windows side by side
    batch_size: int = MISSING  # windows or passages of one forward pass
    max_samples: int | None = None  # windows (of each set) or passages; None: all

    def problems(self) -> Iterator[str]:
        """Yield what does not depend on the trained run; the rest is in ``gpt.runs.evaluation``."""
        if self.kind is EvaluateKind.split and self.path is not None:
            yield (
                f"evaluate.path={self.path} goes with evaluate.kind=text or cloze; "
                "the split of other token files: data=tokens data.path=..."
            )
        if self.kind is not EvaluateKind.split and not self.path:
            yield f"evaluate.kind={self.kind.value} reads a file: name it with evaluate.path=..."
        if self.kind is not EvaluateKind.text and self.detokenizer is not Detokenizer.none:
            yield f"evaluate.detokenizer={self.detokenizer.value} goes with evaluate.kind=text, not {self.kind.value}"
        if self.kind is EvaluateKind.cloze and self.stride is not None:
            yield f"evaluate.stride={self.stride}: evaluate.kind=cloze has passages, not windows"


# Schema of grids: many runs from one command, and the page about them.


@dataclass(frozen=True)
class Grid:
    """How the cells of a grid (``-m``) run. None of it changes what a cell computes."""

    name: str | None = None  # None: what is swept, and a hash of what is not
    slots: int | None = None  # devices or cores that are shared out; None: all of this host
    retries: int = MISSING
    fail_fast: bool = MISSING
    confirm_above: int = MISSING


@dataclass(frozen=True)
class Report:
    """The page about runs."""

    path: str | None = None  # a grid, or any folder with runs in it
    output: str | None = None  # the folder that gets the page and the tables; None: the same


class Sampler(Enum):
    """How Optuna proposes values."""

    tpe = "tpe"
    random = "random"


@dataclass(frozen=True)
class Optuna:
    """A search over hyper-parameters (``-m hparams=optuna``). None of it changes what a trial computes."""

    search: bool = MISSING
    trials: int = MISSING
    parallel: int | None = None  # trials at a time; None: as many as the slots hold
    sampler: Sampler = MISSING
    seed: int = MISSING
    startup_trials: int = MISSING
    space: dict[str, str] = field(default_factory=dict)  # key -> a sweep as on the command line, which wins
    prune: bool = MISSING
    prune_from: int | None = None  # steps of the first rung; None: Optuna's estimate from the first whole trial
    reduction_factor: int = MISSING


# The typed sections of a plan: what a device can do, and what is asked of the plan. See docs/plan.md.


class Attention(Enum):
    """What the attention of a device keeps for the backward pass."""

    flash = "flash"  # neither scores nor probabilities, and the causal half of the work (Dao et al., 2022)
    matrix = "matrix"  # probabilities, their dropout mask and what it leaves (Korthikanti et al., 2022)


@dataclass(frozen=True)
class Peaks:
    """Dense matrix products by element type, in TFLOP/s. None: not stated, so no time and no MFU is said."""

    fp32: float | None = None
    bf16: float | None = None
    fp16: float | None = None


@dataclass(frozen=True)
class DeviceSpec:
    """What one accelerator can do. None: not known, and then nothing that needs it is said.

    Bandwidths are in 1e9 bytes per second; those of links are per device and direction.
    """

    name: str | None = None
    match: list[str] = field(default_factory=list)  # parts of the name that Paddle gives it
    memory_gib: float | None = None
    peak_tflops: Peaks = field(default_factory=Peaks)
    efficiency: float = 0.7  # share of the peak that large matrix products reach; of all else by bandwidths
    bandwidth_share: float = 0.8  # of the stated bandwidths that passes over memory and large messages reach
    attention: Attention = Attention.matrix
    bandwidth_gb_s: float | None = None  # of its memory
    intra_node_gb_s: float | None = None
    inter_node_gb_s: float | None = None
    per_node: int = 8
    shared: bool = False  # all ranks of a node share one: the cores of a host
    watts: float | None = None
    price_per_hour: float | None = None  # of one device, in whatever currency


@dataclass(frozen=True)
class Plan:
    """Of ``task=plan``."""

    token_budget: int | None = None  # tokens to train on; None: trainer.max_steps global batches
    reserve_gib: float = 2.0  # of every device's memory, for its context, NCCL and what fragments
    require_fit: bool = False  # leave with 2 if the job does not fit
    search: bool = False  # rank all layouts of plan.devices devices
    devices: int | None = (
        None  # of a search, or of parallel=auto; None: as the layout at hand has ranks, or as are here
    )
    top: int = 10  # layouts to show
    picture: str | None = None  # file for the pipeline's timeline, .svg or .png


# The schema's section ``prepare``; see ``gpt.config.schema``.


class TextFormat(Enum):
    """What a file of raw text is; auto: its ending says."""

    auto = "auto"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"


class DocumentRule(Enum):
    """Where a document of plain text ends."""

    file = "file"
    line = "line"
    blank_line = "blank_line"
    literal = "literal"  # at prepare.separator, wherever it stands
    regex = "regex"  # at a line in which prepare.separator matches


class Sentences(Enum):
    """What is a sentence within a document."""

    none = "none"
    line = "line"
    punkt = "punkt"  # as nltk finds it


@dataclass(frozen=True)
class Prepare(Section):
    """Of ``task=prepare``: raw text to token files."""

    input: Any = None  # a file, a folder, a glob, - for standard input, or a list of such
    output: str | None = None  # prefix of the files that are made
    tokenizer: str | None = None  # a tokenizer file; None: train a byte-level BPE of ``vocab`` tokens on the text
    vocab: int = MISSING
    format: TextFormat = MISSING
    json_key: str = MISSING  # also the column of a parquet file
    document: DocumentRule = MISSING
    separator: str | None = None
    append_eot: bool = MISSING
    sentences: Sentences = MISSING  # ``lens`` has one entry per sentence, ``docs`` still one per document
    language: str = MISSING  # of punkt's model
    min_length: int = MISSING  # characters; shorter documents are left out
    shuffle: bool = MISSING  # documents in an order that ``seed`` decides
    dedup: bool = MISSING  # of identical documents only the first stays
    val_share: float = MISSING  # of the documents, chosen by a hash of their text, into a set of their own
    limit: int | None = None  # documents to read, for trying
    max_bad: float = MISSING  # share of records that may be unreadable
    workers: int | None = None  # None: one per core

    def problems(self) -> Iterator[str]:
        """Yield what is wrong whatever the files hold; the rest is in ``gpt.data.preprocess``."""
        if not self.input:
            yield "prepare.input has no value: give files, folders, globs, or - with prepare.input=..."
        if not self.output:
            yield "prepare.output has no value: give the prefix of the files to make with prepare.output=..."
        if self.tokenizer is None and self.vocab <= BYTE_ALPHABET:
            yield f"prepare.vocab={self.vocab}: a byte-level BPE needs at least {BYTE_ALPHABET + 1} tokens"
        if self.tokenizer is None and self.input == "-":
            yield (
                "prepare.input=- needs prepare.tokenizer=...: training one reads the text before it is encoded, "
                "and standard input comes only once"
            )
        for key in ("val_share", "max_bad"):
            if not 0 <= getattr(self, key) < 1:
                yield f"prepare.{key}={getattr(self, key)}: a share from 0 up to but not including 1"
        if (self.document in (DocumentRule.literal, DocumentRule.regex)) != bool(self.separator):
            yield f"prepare.document={self.document.value}: prepare.separator goes with literal and regex only"
        elif self.document is DocumentRule.regex:
            try:
                re.compile(str(self.separator))
            except re.error as error:
                yield f"prepare.separator={self.separator}: not a regular expression ({error})"


# The schema of what a trained model does: ``task=generate`` and ``serve``; see ``gpt.config.schema``.


class Split(Enum):
    """A part of the documents."""

    train = "train"
    val = "val"
    test = "test"


@dataclass(frozen=True)
class Generate(Section):
    """Of ``task=generate``, of requests to ``task=serve`` that say less, and of the sample that closes a run."""

    prompt: str = MISSING
    prompts: str | None = None  # a file of prompts, a line each (.jsonl: a "prompt" each), or - for standard input
    interactive: bool = MISSING  # a session: every line that is typed is continued
    output: str | None = None  # JSON lines with the texts go there too
    stream: bool = MISSING  # show the text as it comes
    batch_size: int = MISSING  # prompts that are continued side by side
    max_new_tokens: int = MISSING
    min_new_tokens: int = MISSING  # no end of text before
    temperature: float = MISSING
    top_k: int = MISSING
    top_p: float = MISSING
    repetition_penalty: float = MISSING
    stop: list[str] = MISSING  # the text ends before the first of these
    num_return_sequences: int = MISSING
    num_beams: int = MISSING  # more than 1: beam search, without sampling
    length_penalty: float = MISSING

    def unattended_problems(self, place: str) -> Iterator[str]:
        """Yield where prompts would be typed."""
        if self.interactive:
            yield f"generate.interactive=true does not go with {place}, which has no terminal: generate.prompts=FILE"
        if self.prompts == "-":
            yield f"generate.prompts=- does not go with {place}, which has no standard input: generate.prompts=FILE"


@dataclass(frozen=True)
class Serve(Section):
    """Of ``task=serve``."""

    host: str = MISSING
    port: int = MISSING  # 0: any that is free
    api_key_env: str | None = None  # name of the environment variable with the key that clients must send
    queue: int = MISSING  # requests that may wait while another one is answered
    queue_seconds: float = MISSING  # how long one may wait
    max_body: int = MISSING  # bytes of a request
    max_texts: int = MISSING  # prompts x texts (or beams) of a request
    max_tokens: int | None = None  # new tokens of a text; null: as many as the model has positions

    def problems(self) -> Iterator[str]:
        """Yield numbers that no server can have."""
        if self.port > 65535:
            yield f"serve.port={self.port}: at most 65535"
        if not 0 < self.queue_seconds < float("inf"):
            yield f"serve.queue_seconds={self.queue_seconds}: must be more than 0"

    def unattended_problems(self, place: str) -> Iterator[str]:
        """Yield the reason why a server is started by hand."""
        yield (
            f"task=serve does not go with {place}: it has no end, and its clients must know its address; "
            "start it without -m, on this machine or on a node that you hold (salloc)"
        )


# The schema's sections ``import_weights`` and ``export``; see ``gpt.config.schema``.


class Foreign(Enum):
    """Whose weights are read; auto: the files say."""

    auto = "auto"
    huggingface = "huggingface"
    fleetx = "fleetx"


class Target(Enum):
    """What is written."""

    huggingface = "huggingface"  # a folder for transformers
    paddle = "paddle"  # a static model for Paddle Inference


@dataclass(frozen=True)
class ImportWeights:
    """Of ``task=import_weights``: other projects' weights to a checkpoint."""

    source: str | None = None  # a folder, or a file of weights in it
    output: str | None = None  # the checkpoint folder that is made
    format: Foreign = MISSING
    tokenizer: str | None = None  # a tokenizer file or folder, or gpt2; None: the one that lies with the weights


@dataclass(frozen=True)
class Export(Section):
    """Of ``task=export``: a checkpoint to a folder that others read."""

    format: Target = MISSING
    output: str | None = None  # the folder that is made

    def problems(self) -> Iterator[str]:
        """Yield that there is no folder to make."""
        if not self.output:
            yield "export.output has no value: give the folder to make with export.output=..."
