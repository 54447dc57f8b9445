"""The model is GPT-2's, causal, counted and initialised as published; ways of computing it do not change it."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest
from conftest import SMALL, configured
from paddle.nn import functional as F

from gpt.config.cluster import Device
from gpt.config.derived import padded_vocab
from gpt.config.schema import Config
from gpt.model import layers
from gpt.model.gpt import GPT
from gpt.parallel.topology import Topology
from gpt.plan import flops
from gpt.utils.rng import initial_value

DATA = ["data=tokens", "data.path=x"]
NO_DROPOUT = ["model.dropout=0", "model.attention_dropout=0"]


def build(*overrides: str, initialise: bool = True) -> GPT:
    config = configured([*SMALL, *DATA, *overrides])
    model = GPT(config, Topology(config.parallel, Device.cpu))
    if initialise:
        model.initialise()
    return model


def tokens(rows: int = 2, length: int = 32, vocab: int = 384, seed: int = 0) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(seed).integers(0, vocab, (rows, length)))


def loss_and_gradients(model: GPT, seed: int = 5) -> tuple[float, dict[str, np.ndarray]]:
    x, y = tokens(seed=1), tokens(seed=2)
    model.clear_gradients()
    paddle.seed(seed)
    loss = model.loss(x, y, paddle.ones(x.shape), float(x.size))
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in model.logical_parameters().items()}


# --- counts and published numbers ---

PUBLISHED = {
    "345m": 354_871_296,
    "1.3b": 1_313_722_368,
    "6.7b": 6_654_402_560,
    "13b": 12_864_768_000,
    "175b": 174_603_264_000,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_plan_counts_the_published_number_of_parameters(name: str) -> None:
    assert flops.parameters(configured([f"model={name}", *DATA])) == PUBLISHED[name]


@pytest.mark.parametrize("overrides", [[], ["model.ffn=48", "model.layers=3"], ["model.vocab=400"]])
def test_the_plan_counts_what_the_model_has(overrides: list[str]) -> None:
    model = build(*overrides, initialise=False)
    assert sum(p.size for p in model.parameters()) == flops.parameters(model.config)


def test_gpt2_small_has_its_124_million_parameters() -> None:
    config = configured(["model=124m", *DATA])
    gpt2 = flops.parameters(config) - (padded_vocab(config) - 50257) * 768
    assert gpt2 == 124_439_808  # of the released GPT-2 small: 50257 tokens


def test_a_layer_has_twelve_tensors() -> None:
    assert len(build("model.layers=24", initialise=False).logical_parameters()) == 12 * 24 + 4  # 292, as published


@pytest.mark.parametrize("hidden", [64, 256])
def test_the_first_loss_is_as_predicted(hidden: int) -> None:
    # ln V + init_std^2 h / 2; independent labels, so the spread of the mean over 4096 positions is about 0.005.
    model = build(f"model.hidden={hidden}", "model.positions=256", "model.vocab=1024", "model.init_std=0.05")
    model.eval()
    x, y = tokens(16, 256, 1024, 1), tokens(16, 256, 1024, 2)
    with paddle.no_grad():
        loss = model.loss(x, y, paddle.ones(x.shape), float(x.size)).item()
    assert loss == pytest.approx(math.log(1024) + 0.05**2 * hidden / 2, abs=0.03)
    assert loss == pytest.approx(flops.first_loss(model.config), abs=0.03)


def test_first_losses_of_the_published_sizes() -> None:
    for name, expected in {"345m": 11.03, "1.3b": 11.24, "6.7b": 11.64, "13b": 11.85, "175b": 13.30}.items():
        assert flops.first_loss(configured([f"model={name}", *DATA])) == pytest.approx(expected, abs=0.006)


# --- initial values ---


def test_initial_values_depend_on_seed_and_name_only() -> None:
    one, same = build(), build("model.layers=1", "parallel=single")
    for name, p in same.logical_parameters().items():
        assert (p.numpy() == one.logical_parameters()[name].numpy()).all() or "out" in name or "fc2" in name
    assert (initial_value(1, "a", [4, 4], 0.02) != initial_value(2, "a", [4, 4], 0.02)).all()
    assert (initial_value(1, "a", [4, 4], 0.02) != initial_value(1, "b", [4, 4], 0.02)).all()


@pytest.mark.parametrize("scaled", [True, False])
def test_the_switch_scales_projections_into_the_residual_stream(scaled: bool) -> None:
    model = build("model.hidden=128", "model.layers=8", f"model.scale_output_init={scaled}")
    for name, p in model.logical_parameters().items():
        values = p.numpy()
        if name.endswith((".out.weight", ".fc2.weight")):
            assert values.std() == pytest.approx(0.02 / math.sqrt(16) if scaled else 0.02, rel=0.05)
        elif name.endswith(".bias"):
            assert (values == 0).all()
        elif ".norm" in f".{name}":
            assert (values == 1).all()
        else:
            assert values.std() == pytest.approx(0.02, rel=0.05)


# --- the maths ---


def reference_logits(model: GPT, x: np.ndarray) -> np.ndarray:
    """GPT-2's forward pass in numpy float64, written from the paper."""
    m = model.config.model
    w = {name: p.numpy().astype(np.float64) for name, p in model.logical_parameters().items()}

    def norm(h: np.ndarray, name: str) -> np.ndarray:
        centred = h - h.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + m.layer_norm_eps)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    h = w["word.weight"][x] + w["position.weight"][: x.shape[1]]
    size = m.hidden // m.heads
    for i in range(m.layers):
        at = f"layers.{i}"
        qkv = norm(h, f"{at}.norm1") @ w[f"{at}.attention.qkv.weight"] + w[f"{at}.attention.qkv.bias"]
        heads = []
        for j in range(m.heads):  # the columns of head j: q_j, k_j, v_j
            q, k, v = np.split(qkv[..., j * 3 * size : (j + 1) * 3 * size], 3, axis=-1)
            scores = q @ k.swapaxes(-1, -2) / math.sqrt(size)
            scores[..., np.triu(np.ones(scores.shape[-2:], bool), 1)] = -np.inf
            e = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(e / e.sum(-1, keepdims=True) @ v)
        h = h + np.concatenate(heads, -1) @ w[f"{at}.attention.out.weight"] + w[f"{at}.attention.out.bias"]
        f = norm(h, f"{at}.norm2") @ w[f"{at}.fc1.weight"] + w[f"{at}.fc1.bias"]
        f = 0.5 * f * (1 + np.tanh(math.sqrt(2 / math.pi) * (f + 0.044715 * f**3)))
        h = h + f @ w[f"{at}.fc2.weight"] + w[f"{at}.fc2.bias"]
    return norm(h, "norm") @ w["word.weight"].T


def test_logits_are_those_of_gpt2() -> None:
    model = build("model.init_std=0.2")
    model.eval()
    x = tokens()
    with paddle.no_grad():
        ours = model(x).numpy()
    np.testing.assert_allclose(ours, reference_logits(model, x.numpy()), rtol=1e-3, atol=1e-3)


def test_no_gradient_flows_from_the_future() -> None:
    model = build("model.init_std=0.2", *NO_DROPOUT)
    x = tokens(1)
    for position in (0, 13, 31):
        embedded = model.position(model.word(x))
        embedded.stop_gradient = False
        embedded.retain_grads()
        h = embedded
        for block in model.layers.values():
            h = block(h)
        direction = paddle.to_tensor(np.random.default_rng(position).standard_normal(32).astype(np.float32))
        (model.norm(h)[0, position] * direction).sum().backward()
        reach = np.abs(embedded.grad.numpy()[0]).sum(-1)
        assert (reach[: position + 1] > 0).all()
        assert (reach[position + 1 :] == 0).all()


def test_padding_rows_never_win_and_never_count() -> None:
    model = build("model.vocab=300")
    model.eval()
    x = tokens(vocab=300)
    with paddle.no_grad():
        logits = model(x)
        assert logits.shape[-1] == 384
        assert (logits[..., 300:].numpy() < -1e8).all()
        loss = model.loss(x, x, paddle.ones(x.shape), float(x.size)).item()
        real = F.cross_entropy(logits[..., :300].reshape([-1, 300]), x.flatten()).item()
    assert loss == pytest.approx(real, rel=1e-6)


def test_the_loss_is_the_mean_over_counted_positions() -> None:
    model = build(*NO_DROPOUT)
    model.eval()
    x, y = tokens(seed=1), tokens(seed=2)
    mask = paddle.to_tensor((np.random.default_rng(3).random(x.shape) < 0.5).astype(np.float32))
    with paddle.no_grad():
        loss = model.loss(x, y, mask, mask.sum().item()).item()
        each = F.cross_entropy(model(x).reshape([-1, 384]), y.flatten(), reduction="none").flatten().numpy()
    assert loss == pytest.approx((each * mask.numpy().flatten()).sum() / mask.numpy().sum(), rel=1e-5)


# --- ways of computing it ---


def assert_same(one: tuple[float, dict[str, np.ndarray]], other: tuple[float, dict[str, np.ndarray]]) -> None:
    """Bit for bit."""
    assert one[0] == other[0]
    for name, gradient in one[1].items():
        assert (gradient == other[1][name]).all(), name


@pytest.mark.parametrize("how", ["full", "full_attn", "core_attn"])
def test_recompute_changes_nothing_not_even_dropout(how: str) -> None:
    assert_same(loss_and_gradients(build()), loss_and_gradients(build(f"model.recompute={how}")))
    exempt = build(f"model.recompute={how}", "model.no_recompute_layers=[1]")
    assert_same(loss_and_gradients(build()), loss_and_gradients(exempt))


def test_recompute_exempts_the_layers_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("gpt.model.gpt.recompute", lambda f, *a: calls.append(f) or f(*a))
    build("model.recompute=full", "model.no_recompute_layers=[1]").loss(tokens(), tokens(), paddle.ones([2, 32]), 64.0)
    assert len(calls) == 1


def test_dropout_follows_the_seed() -> None:
    model = build()
    assert_same(loss_and_gradients(model, 1), loss_and_gradients(model, 1))
    assert loss_and_gradients(model, 1)[0] != loss_and_gradients(model, 2)[0]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_a_chunked_loss_is_the_same_loss(chunk: int) -> None:
    whole, parts = loss_and_gradients(build()), loss_and_gradients(build(f"model.loss_chunk={chunk}"))
    assert whole[0] == pytest.approx(parts[0], rel=1e-6)
    for name, gradient in whole[1].items():
        np.testing.assert_allclose(gradient, parts[1][name], rtol=1e-4, atol=1e-7)


def test_decoding_with_a_cache_gives_the_logits_of_the_whole() -> None:
    model = build("model.init_std=0.2")
    model.eval()
    x = tokens(3, 20)
    with paddle.no_grad():
        whole = model(x).numpy()
        cache = model.new_cache(20, np.zeros(3, dtype=np.int64))
        steps = [model.decode(x[:, :7], cache).numpy()]
        steps += [model.decode(x[:, t : t + 1], cache).numpy() for t in range(7, 20)]
    np.testing.assert_allclose(np.stack(steps, 1), whole[:, 6:, : model.config.model.vocab], rtol=1e-3, atol=1e-4)


# --- operations against their plain formulas ---


def plain_attention(qkv: paddle.Tensor) -> paddle.Tensor:
    q, k, v = (t.transpose([0, 2, 1, 3]) for t in paddle.split(qkv, 3, axis=-1))
    scores = paddle.matmul(q, k, transpose_y=True) / math.sqrt(q.shape[-1])
    scores = scores + paddle.triu(paddle.full(scores.shape[-2:], -1e9), 1)
    return paddle.matmul(F.softmax(scores, axis=-1), v).transpose([0, 2, 1, 3])


@pytest.mark.parametrize("length", [1, 5, 256, 300, 600])
def test_attention_is_the_plain_formula(length: int) -> None:
    values = np.random.default_rng(0).standard_normal((2, length, 3, 24)).astype(np.float32)
    weights = paddle.to_tensor(np.random.default_rng(1).standard_normal((2, length, 3, 8)).astype(np.float32))
    outs, grads = [], []
    for attend in (lambda x: layers.causal_attention(x, 0.0), plain_attention):
        x = paddle.to_tensor(values, stop_gradient=False)
        out = attend(x)
        (out * weights).sum().backward()
        outs.append(out.numpy())
        grads.append(x.grad.numpy())
    np.testing.assert_allclose(*outs, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(*grads, rtol=2e-3, atol=2e-4)


def test_attention_dropout_keeps_the_mean_and_the_gradient_is_of_the_same_mask() -> None:
    values = np.random.default_rng(0).standard_normal((1, 40, 2, 12)).astype(np.float64)
    base = paddle.to_tensor(values.astype(np.float32))
    outs = []
    for seed in range(300):
        paddle.seed(seed)
        outs.append(layers.causal_attention(base, 0.3).numpy())
    np.testing.assert_allclose(np.mean(outs, 0), plain_attention(base).numpy(), atol=0.15)

    # A directional derivative against a finite difference, under one mask.
    direction = np.random.default_rng(1).standard_normal(values.shape)
    x = paddle.to_tensor(values.astype(np.float32), stop_gradient=False)
    paddle.seed(7)
    (layers.causal_attention(x, 0.3) ** 2).sum().backward()
    ahead = (x.grad.numpy().astype(np.float64) * direction).sum()

    def value(step: float) -> float:
        paddle.seed(7)
        moved = paddle.to_tensor((values + step * direction).astype(np.float32))
        return float((layers.causal_attention(moved, 0.3).numpy().astype(np.float64) ** 2).sum())

    assert ahead == pytest.approx((value(1e-3) - value(-1e-3)) / 2e-3, rel=1e-2)


def test_dropout_drops_the_stated_share_and_scales_the_rest() -> None:
    x = paddle.ones([400, 500])
    x.stop_gradient = False
    paddle.seed(3)
    y = layers.dropout(x, 0.1, training=True)
    y.sum().backward()
    dropped = (y.numpy() == 0).mean()
    assert dropped == pytest.approx(0.1, abs=0.004)  # five standard deviations
    assert np.allclose(y.numpy()[y.numpy() != 0], 1 / 0.9, rtol=1e-4)
    assert (x.grad.numpy() == y.numpy()).all()
    assert (layers.dropout(x, 0.1, training=False).numpy() == 1).all()


def test_gelu_is_the_tanh_approximation() -> None:
    values = np.linspace(-6, 6, 4001).astype(np.float32)
    x, reference = (paddle.to_tensor(values, stop_gradient=False) for _ in range(2))
    ours, theirs = layers.gelu(x), F.gelu(reference, approximate=True)
    (ours * ours).sum().backward()
    (theirs * theirs).sum().backward()
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=2e-6)
    np.testing.assert_allclose(x.grad.numpy(), reference.grad.numpy(), rtol=1e-5, atol=1e-5)


def test_the_config_is_not_changed_by_building(small: list[str]) -> None:
    config: Config = configured(small)
    before = repr(config)
    GPT(config, Topology(config.parallel, Device.cpu)).initialise()
    assert repr(config) == before
