"""AdamW with decay groups, the global norm, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gpt.config import Optimizer, Schedule, ScheduleName

if TYPE_CHECKING:
    import paddle


def lr_at(step: int, peak: float, schedule: Schedule) -> float:
    """Learning rate of update ``step``; the first update is step 1.

    Linear warm-up over w steps, then min + (peak - min)(1 + cos(pi (t - w) / (D - w))) / 2 up to D, then min
    (Loshchilov and Hutter, SGDR, 2017, without restarts); or flat after warm-up.

    Example:
        >>> lr_at(1, 5e-5, Schedule(ScheduleName.cosine, warmup_steps=3600, decay_steps=360000, min_lr=1e-5))
        1.388888888888889e-08
    """
    warmup, decay, floor = schedule.warmup_steps, schedule.decay_steps, schedule.min_lr
    if step <= warmup and warmup > 0:
        return peak * (step / warmup)
    if schedule.name is ScheduleName.constant:
        return peak
    if step > decay or decay == warmup:
        return floor
    return floor + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (decay - warmup))) * (peak - floor)


def decays(name: str) -> bool:
    """Whether weight decay applies to a parameter: matrices and embeddings, not biases and LayerNorm."""
    return not name.endswith(".bias") and ".norm" not in f".{name}"


def build(parameters: dict[str, paddle.Tensor], settings: Optimizer, *, master_weights: bool) -> Any:
    """Paddle's AdamW over all parameters; the engine sets the rate and clips.

    Args:
        parameters: by logical name.
        settings: of the optimizer section.
        master_weights: keep float32 copies of weights of a smaller type.
    """
    import paddle

    decayed = {p.name for name, p in parameters.items() if decays(name)}
    return paddle.optimizer.AdamW(
        learning_rate=settings.lr,
        beta1=settings.betas[0],
        beta2=settings.betas[1],
        epsilon=settings.eps,
        weight_decay=settings.weight_decay,
        parameters=list(parameters.values()),
        apply_decay_param_fun=decayed.__contains__,
        multi_precision=master_weights,
    )


def global_norm(parameters: list[paddle.Tensor]) -> float:
    """Root of the sum of squares of all gradients, in float32; one number for the host."""
    from gpt import ops

    gradients = [p.grad for p in parameters if p.grad is not None]
    return math.sqrt(ops.sum_of_squares(gradients))


def clip(parameters: list[paddle.Tensor], norm: float, limit: float) -> None:
    """Scale all gradients by limit / norm if that is less than one, in place."""
    import paddle

    if 0 < limit < norm:
        with paddle.no_grad():
            for p in parameters:
                if p.grad is not None:
                    p.grad.scale_(limit / norm)


def state_of(optimizer: Any, parameters: dict[str, paddle.Tensor]) -> dict[str, paddle.Tensor]:
    """Optimizer slots by ``<logical name>.<slot>``; Paddle's own keys depend on the order of construction."""
    by_paddle_name = sorted(((p.name, name) for name, p in parameters.items()), key=lambda pair: -len(pair[0]))
    slots = {}
    for key, value in optimizer.state_dict().items():
        if key in ("LR_Scheduler", "master_weights"):
            continue
        owner, name = next((o, n) for o, n in by_paddle_name if key.startswith(f"{o}_"))
        slots[f"{name}.{key[len(owner) + 1 :]}"] = value
    return slots


def restore(
    optimizer: Any, parameters: dict[str, paddle.Tensor], slots: dict[str, Any], master: dict[str, Any]
) -> None:
    """The inverse of ``state_of``.

    Args:
        optimizer: freshly built.
        parameters: by logical name.
        slots: arrays by ``<logical name>.<slot>``.
        master: float32 weights by logical name, empty if there are none.
    """
    import paddle

    state: dict[str, Any] = {}
    for name, p in parameters.items():
        prefix = f"{name}."
        for key in [k for k in slots if k.startswith(prefix) and "." not in k[len(prefix) :]]:
            state[f"{p.name}_{key[len(prefix) :]}"] = paddle.to_tensor(slots[key])
    if master:
        state["master_weights"] = {p.name: paddle.to_tensor(master[n], dtype="float32") for n, p in parameters.items()}
    optimizer.set_state_dict(state)
