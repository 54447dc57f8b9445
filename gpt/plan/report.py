"""The plan as tables of words, for people."""

from __future__ import annotations

from dataclasses import dataclass

from gpt.config.derived import accumulate_steps, global_batch_size, micro_batch_size
from gpt.config.rules import missing_device_keys
from gpt.config.schema import Config, Recompute
from gpt.plan import flops
from gpt.plan import memory as memory_plan
from gpt.plan.communication import traffic
from gpt.plan.explain import AutoParallelResult, bottleneck
from gpt.plan.memory import Memory
from gpt.plan.search import GIB, Candidate, fits_memory, limit
from gpt.plan.step_time import Cost, cost
from gpt.plan.summary import duration, layout

DAY = 86400.0
CALIBRATE = "this host was not measured yet: python scripts/calibrate.py"
Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows of equally many cells under a header."""

    title: str
    header: Row
    rows: list[Row]


def compute(config: Config) -> str:
    """FLOPs of a token by each convention, the formula named."""
    causal, whole = (flops.flops_per_token(config, causal=value) / 1e9 for value in (True, False))
    text = f"{causal:,.4g} GFLOP a token (6 N + 6 L h s, causal); {whole:,.4g} with the whole square (PaLM)"
    if config.model.recompute is Recompute.none and not config.model.loss_chunk:
        return text
    executed = flops.hardware_flops_per_token(config) / 1e9
    return f"{text}; {executed:,.4g} executed (recompute {config.model.recompute.value})"


def budget(config: Config) -> int:
    """Tokens to train on."""
    return config.plan.token_budget or config.trainer.max_steps * global_batch_size(config) * config.data.seq_len


def memory_table(config: Config) -> Table:
    """GiB per rank of the first, a middle and the last stage, and of the fullest if that is another."""
    needs, parts = memory_plan.stages(config), flops.stage_parameters(config)
    last = len(needs) - 1
    fullest = max(range(len(needs)), key=lambda stage: needs[stage].total)
    shown = sorted({0, last // 2, last, fullest})
    names = {0: "first", last: "last"} if last else {0: "all"}
    rows: list[Row] = []
    for stage in shown:
        need: Memory = needs[stage]
        name = names.get(stage, "middle") + (f" {stage}" if last else "")
        sizes = (need.weights, need.gradients, need.optimizer, need.activations, need.working, need.total)
        mark = " *" if stage == fullest and last else ""
        rows.append((name + mark, _short(parts[stage].elements), *(f"{size / GIB:.2f}" for size in sizes)))
    title = f"memory per rank, GiB (recompute {config.model.recompute.value})"
    return Table(title, ("stage", "params", "weights", "grads", "optim", "activ", "working", "total"), rows)


def traffic_table(config: Config) -> Table | None:
    """What every axis sends in a step; None for one rank."""
    rows: list[Row] = []
    for one in traffic(config):
        where = "between nodes" if one.slow else "in a node"
        rate = f"{one.rate / 1e9:.0f} GB/s {where}" if one.rate else where
        seconds = duration(one.seconds) if one.seconds is not None else "-"
        rows.append((one.axis, _gigabytes(one.sent), rate, seconds))
    return Table("sent per rank and step", ("axis", "bytes", "over", "takes"), rows) if rows else None


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.0f} GB" if count >= 1e10 else f"{count / 1e9:.3g} GB"


def times(config: Config) -> list[tuple[str, str]]:
    """Seconds of a step, tokens per second, days, and what they cost; or why nothing is said."""
    found = cost(config)
    if found is None:
        if config.device.name is None:
            return [("time", "no device is stated, so no time is said: device=a100_80, h100, v100_32, ...")]
        if config.device.name == "cpu" and config.precision.dtype.value == "fp32":
            return [("time", f"not said: {CALIBRATE}")]
        stated = [t for t in ("fp32", "bf16", "fp16") if getattr(config.device.peak_tflops, t)]
        lacking = f"{config.device.name} does not state {', '.join(missing_device_keys(config))}"
        return [("time", f"not said: {lacking} (it has peaks for precision={', '.join(stated) or 'nothing'})")]
    tokens = budget(config)
    days = tokens / found.tokens_per_second / DAY
    steps = -(-tokens // found.tokens)
    rows = [
        ("time", f"{duration(found.seconds)} a step = {_shares(found)}"),
        ("speed", f"{found.tokens_per_second:,.0f} tokens/s, {found.tokens_per_second / found.ranks:,.0f} per device, "
         f"MFU {found.mfu:.1%}, HFU {found.hfu:.1%}"),
        ("horizon", f"{steps:,} steps = {tokens:,} tokens in {duration(days * DAY)}"),
    ]  # fmt: skip
    hours = days * 24 * found.ranks
    device = config.device
    spent = [f"{hours:,.0f} device hours"]
    spent += (
        [f"{hours * device.price_per_hour:,.0f} at {device.price_per_hour:g} an hour"] if device.price_per_hour else []
    )
    spent += [f"{hours * device.watts / 1e6:,.3g} MWh at {device.watts:g} W"] if device.watts else []
    return [*rows, ("cost", ", ".join(spent))]


def _shares(found: Cost) -> str:
    parts = [("compute", found.compute), ("exchanges", found.exposed), ("waiting", found.bubble)]
    return " + ".join(f"{name} {duration(value)}" for name, value in parts if value)


GRID = ("model", "layout", "batch", "rec.", "GiB", "fits", "s/step", "tokens/s", "MFU", "days")


def grid_row(config: Config) -> Row:
    """One job of a grid; for the header ``GRID``."""
    found, need = cost(config), memory_plan.memory(config)
    says = fits_memory(config)
    room = limit(config)
    spare = f" {(room - need.total) / GIB:+.1f}" if room is not None else ""
    batch = f"{global_batch_size(config)}={accumulate_steps(config)}x{micro_batch_size(config)}"
    figures = ("-",) * 4
    if found:
        days = budget(config) / found.tokens_per_second / DAY
        figures = (f"{found.seconds:.3g}", f"{found.tokens_per_second:,.0f}", f"{found.mfu:.1%}", f"{days:,.3g}")
    verdict = {True: "yes", False: "no", None: "-"}[says] + spare
    how = config.model.recompute.value
    return (config.model.name, layout(config), batch, how, f"{need.total / GIB:.1f}", verdict, *figures)


SPEEDS = ("s/step", "tokens/s", "MFU")
SEARCH = ("", "layout", "micro", "recompute", "GiB", "s/step", "tokens/s", "MFU", "bound by")


def search_rows(found: list[Candidate], top: int) -> list[Row]:
    """The best; for the header ``SEARCH``."""
    rows: list[Row] = []
    for number, one in enumerate(found[:top], 1):
        assert one.cost is not None
        figures = (
            f"{one.seconds:.3g}",
            f"{one.cost.tokens_per_second:,.0f}",
            f"{one.cost.mfu:.1%}",
            bottleneck(one.cost),
        )
        how = one.config.model.recompute.value
        size = str(micro_batch_size(one.config))
        rows.append((str(number), layout(one.config), size, how, f"{one.bytes / GIB:.1f}", *figures))
    return rows


def choice_columns(choice: AutoParallelResult) -> tuple[Row, list[Row]]:
    """Header and rows of the layouts that were best; where rates had to be assumed, times only compare."""
    best, guessed = choice.best, bool(choice.assumed)
    header = ("", "layout", "micro", "recompute", "GiB", "share", *(("time, best 1",) if guessed else SPEEDS))
    rows: list[Row] = []
    for number, one in enumerate(best, 1):
        room = limit(one.config)
        assert room is not None
        assert one.cost is not None
        speed: Row = (f"{one.seconds / best[0].seconds:.3f}",)
        if not guessed:
            speed = (f"{one.seconds:.3g}", f"{one.cost.tokens_per_second:,.0f}", f"{one.cost.mfu:.1%}")
        size, how = str(micro_batch_size(one.config)), one.config.model.recompute.value
        need = one.bytes / GIB
        memory = (f"{need:.1f}" if need >= 1 else f"{need:.2f}", f"{one.bytes / room:.0%}")
        rows.append((str(number), layout(one.config), size, how, *memory, *speed))
    return header, rows


def _short(count: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:,.0f}"
