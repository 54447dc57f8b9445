"""The loss curve of a run."""

from __future__ import annotations

from pathlib import Path

from gpt.config.schema import Config
from gpt.runs.run_dir import read_metrics
from gpt.train.lr_scheduler import lr_at


def loss_curve(run_dir: Path, config: Config, unigram_entropy: float | None) -> Path:
    """Draw losses and learning rate over tokens into ``loss.png``.

    Args:
        run_dir: with the records.
        config: of the run, for the learning rate between records.
        unigram_entropy: nats per token, drawn as a line that a model must get below; None: unknown.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_metrics(run_dir)
    figure, axes = pyplot.subplots(figsize=(9, 5), dpi=120)
    tokens = [r["tokens"] for r in records]
    axes.plot(tokens, [r["train/loss"] for r in records], color="#9db8d9", linewidth=1, label="train loss")
    validations = [r for r in records if "val/loss" in r]
    axes.plot(
        [r["tokens"] for r in validations],
        [r["val/loss"] for r in validations],
        "o-",
        color="#1f4e8c",
        label="validation loss",
    )
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="#c0504d", linestyle="--", linewidth=1, label="unigram entropy")
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=run_dir.name)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right")
    rate = axes.twinx()
    rates = [lr_at(r["step"], config.optimizer.lr, config.schedule) for r in records]
    rate.plot(tokens, rates, color="#bbbbbb", linewidth=1, linestyle=":")
    rate.set_ylabel("learning rate (dotted)", color="#888888")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    path = run_dir / "loss.png"
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path
