"""The optimizers: what each keeps per parameter, and how Paddle's class is made of the settings.

To add one: a row in ``OPTIMIZERS`` and ``conf/optimizer/NAME.yaml``. Training, checkpoints, resharding, ZeRO, CPU
offload and the plan read the row. Paddle is imported only where an optimizer is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpt.config.schema import Optimizer

# Parameters, whether weight decay applies to the one of a (Paddle) name, and whether to keep float32 master weights.
Decays = Callable[[str], bool]
Factory = Callable[[Optimizer, list[Any], Decays, bool], Any]


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer.

    Attributes:
        make: builds Paddle's optimizer.
        moments: float32 values that it keeps per parameter; the plan's bytes and seconds follow from it.
        reads: the settings that matter to it besides ``lr``, ``weight_decay``, ``clip_norm`` and ``offload``.
        semi_auto: whether it was tried under ``parallel.engine=auto``.
    """

    make: Factory
    moments: int
    reads: tuple[str, ...]
    semi_auto: bool = False


def _adamw(settings: Optimizer, parameters: list[Any], decays: Decays, master_weights: bool) -> Any:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""
    import paddle

    return paddle.optimizer.AdamW(
        learning_rate=settings.lr,
        beta1=settings.betas[0],
        beta2=settings.betas[1],
        epsilon=settings.eps,
        weight_decay=settings.weight_decay,
        parameters=parameters,
        apply_decay_param_fun=decays,
        multi_precision=master_weights,
    )


def _groups(settings: Optimizer, parameters: list[Any], decays: Decays) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer whose weight decay is added to the gradient (L2)."""
    import paddle

    decay = paddle.regularizer.L2Decay(settings.weight_decay)
    decayed, others = ([p for p in parameters if decays(p.name) is wanted] for wanted in (True, False))
    return [group for group in ({"params": decayed, "weight_decay": decay}, {"params": others}) if group["params"]]


def _adam(settings: Optimizer, parameters: list[Any], decays: Decays, master_weights: bool) -> Any:
    """Adam (Kingma and Ba, 2015) with L2 regularisation."""
    import paddle

    return paddle.optimizer.Adam(
        learning_rate=settings.lr,
        beta1=settings.betas[0],
        beta2=settings.betas[1],
        epsilon=settings.eps,
        parameters=_groups(settings, parameters, decays),
        multi_precision=master_weights,
    )


def _sgd(settings: Optimizer, parameters: list[Any], decays: Decays, master_weights: bool) -> Any:
    """Stochastic gradient descent with momentum and L2 regularisation."""
    import paddle

    return paddle.optimizer.Momentum(
        learning_rate=settings.lr,
        momentum=settings.momentum,
        parameters=_groups(settings, parameters, decays),
        multi_precision=master_weights,
    )


OPTIMIZERS = {
    "adamw": OptimizerSpec(_adamw, moments=2, reads=("betas", "eps"), semi_auto=True),
    "adam": OptimizerSpec(_adam, moments=2, reads=("betas", "eps")),
    "sgd": OptimizerSpec(_sgd, moments=1, reads=("momentum",)),
}
