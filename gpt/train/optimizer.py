"""The optimizer of a rank, its state by logical names, CPU offload, and the dynamic loss scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gpt.config.optimizers import OPTIMIZERS
from gpt.config.parameters import parameter
from gpt.config.schema import Optimizer
from gpt.utils.signals import GuardError

if TYPE_CHECKING:
    import paddle

    Tensors = dict[str, paddle.Tensor]


class CpuOffloadOptimizer:
    """Keeps float32 weights and slots in host memory and updates them there, for devices with little memory.

    Gradients are copied to the host and updated weights back, once per step. The copies have the names of the
    parameters, so the state is that of an optimizer with master weights.

    Args:
        parameters: on the device.
        make: builds the optimizer over given parameters.
    """

    def __init__(self, parameters: list[paddle.Tensor], make: Callable[[list[paddle.Tensor]], Any]) -> None:
        from paddle.base.framework import EagerParamBase

        self.pairs = [
            (p, EagerParamBase.from_tensor(p.detach().cpu().astype("float32"), name=p.name)) for p in parameters
        ]
        self.inner = make([host for _, host in self.pairs])

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        self.inner.set_lr(lr)

    def step(self) -> None:
        """Update on the host, and copy the result to the device."""
        import paddle

        device = paddle.get_device()
        with paddle.no_grad():
            for p, host in self.pairs:
                host.grad = p.grad.cpu().astype("float32")
            paddle.set_device("cpu")  # for the slots
            self.inner.step()
            paddle.set_device(device)
            for p, host in self.pairs:
                host.clear_gradient(False)
                p.copy_(host.astype(p.dtype), False)

    def state_dict(self) -> dict[str, Any]:
        """Return the slots, and the float32 weights as master weights."""
        return {**self.inner.state_dict(), "master_weights": {host.name: host for _, host in self.pairs}}

    def set_state_dict(self, state: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        master = state.pop("master_weights")
        for _, host in self.pairs:
            host.set_value(master[host.name])
        self.inner.set_state_dict(state)


def build(parameters: Tensors, settings: Optimizer, *, master_weights: bool) -> Any:
    """Build the optimizer over all parameters; the trainer sets the learning rate and clips.

    Args:
        parameters: by logical name, with their initial values.
        settings: of the optimizer section.
        master_weights: keep float32 copies of weights of a smaller type.
    """
    decayed = {p.name for name, p in parameters.items() if parameter(name).weight_decay}

    def make(tensors: list[paddle.Tensor]) -> Any:
        return OPTIMIZERS[settings.name].make(settings, tensors, decayed.__contains__, master_weights)

    tensors = list(parameters.values())
    return CpuOffloadOptimizer(tensors, make) if settings.offload else make(tensors)


@dataclass
class DynamicLossScaler:
    """Factor of a float16 loss, so that small gradients do not vanish (Micikevicius et al., 2018).

    Halved after a step whose gradients overflow, doubled after ``GOOD_STEPS`` without overflow; the same on every rank.
    """

    value: float = 32768.0
    good_steps: int = 0

    GOOD_STEPS: ClassVar[int] = 1000
    LEAST: ClassVar[float] = 2.0**-10

    def scale(self, loss: paddle.Tensor) -> paddle.Tensor:
        """Return the loss to differentiate; Fleet's schedule calls it too."""
        return loss * self.value

    def after_step(self, finite: bool) -> None:
        """Adapt the scale to whether the gradients of a step were finite on all ranks.

        Raises:
            GuardError: the gradients overflow even at the least scale.
        """
        if not finite:
            self.value, self.good_steps = self.value / 2, 0
            if self.value < self.LEAST:
                raise GuardError(f"gradients overflow at every loss scale down to {self.LEAST}; try precision=bf16")
            return
        self.good_steps += 1
        if self.good_steps == self.GOOD_STEPS:
            self.value, self.good_steps = self.value * 2, 0


def state_of(optimizer: Any, parameters: Tensors) -> tuple[Tensors, Tensors]:
    """Return master weights, if any, by logical name, and slots by ``<logical name>.<slot>``."""
    inner = vars(optimizer).get("_inner_opt", optimizer)  # under the semi-auto engine's wrapper
    state = inner.state_dict()
    master = state.pop("master_weights", {})
    state.pop("LR_Scheduler", None)
    weights = {name: master[p.name] for name, p in parameters.items() if p.name in master}
    return weights, to_logical_names(state, parameters)


def to_logical_names(state: Tensors, parameters: Tensors) -> Tensors:
    """Rename slots to ``<logical name>.<slot>``; Paddle's own keys depend on the order of construction."""
    by_paddle_name = sorted(((p.name, name) for name, p in parameters.items()), key=lambda pair: -len(pair[0]))
    slots = {}
    for key, value in state.items():
        owner, name = next((o, n) for o, n in by_paddle_name if key.startswith(f"{o}_"))
        slots[f"{name}.{key[len(owner) + 1 :]}"] = value
    return slots


def to_paddle_names(slots: dict[str, Any], parameters: Tensors) -> Tensors:
    """Return tensors of slot arrays by Paddle's names, without those of other parameters."""
    import paddle

    state = {}
    for name, p in parameters.items():
        prefix = f"{name}."
        for key in [k for k in slots if k.startswith(prefix) and "." not in k[len(prefix) :]]:
            state[f"{p.name}_{key[len(prefix) :]}"] = paddle.to_tensor(slots[key])
    return state


def restore(optimizer: Any, parameters: Tensors, slots: dict[str, Any], master: dict[str, Any]) -> None:
    """Load the arrays of slots and master weights, named as by ``state_of``, into a new optimizer."""
    import paddle

    state: dict[str, Any] = to_paddle_names(slots, parameters)
    if master:
        state["master_weights"] = {p.name: paddle.to_tensor(master[n], dtype="float32") for n, p in parameters.items()}
    optimizer.set_state_dict(state)
