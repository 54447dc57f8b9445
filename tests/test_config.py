"""Every preset composes and holds the published numbers; every bad combination is named with its remedy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from conftest import ROOT, composed, configured

from gpt.config import derived
from gpt.config.rules import check, known_keys
from gpt.runs import run_dir

# The architect's table: vocabulary, hidden, layers, heads, ffn, positions.
MODELS = {
    "124m": (50304, 768, 12, 12, 3072, 1024),
    "345m": (50304, 1024, 24, 16, 4096, 1024),
    "1.3b": (50304, 2048, 24, 16, 8192, 1024),
    "6.7b": (50304, 4096, 32, 32, 16384, 1024),
    "13b": (50432, 5120, 40, 40, 20480, 4096),
    "175b": (51200, 12288, 96, 96, 49152, 1024),
}
# model, parallel: dp, mp, pp, sharding, stage, local batch, micro batch, global batch, recompute.
PRESETS = {
    ("345m", "single"): (1, 1, 1, 1, 1, 8, 8, 8, "none"),
    ("1.3b", "single"): (1, 1, 1, 1, 1, 8, 8, 8, "full"),
    ("1.3b", "dp8"): (8, 1, 1, 1, 1, 8, 8, 64, "full"),
    ("6.7b", "sharding16"): (1, 1, 1, 16, 2, 8, 8, 128, "full"),
    ("175b", "mp8_pp16"): (1, 8, 16, 1, 1, 1536, 1, 1536, "core_attn"),
}


def options(group: str) -> list[str]:
    return sorted(p.stem for p in (ROOT / "conf" / group).glob("*.yaml"))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_preset_has_the_published_shape(name: str) -> None:
    model = configured([f"model={name}", "data=tokens", "data.path=x"]).model
    assert (model.vocab, model.hidden, model.layers, model.heads, model.ffn, model.positions) == MODELS[name]
    assert (model.dropout, model.attention_dropout, model.init_std, model.layer_norm_eps) == (0.1, 0.1, 0.02, 1e-5)


@pytest.mark.parametrize(("model", "parallel"), PRESETS)
def test_a_published_combination_has_the_published_batch(model: str, parallel: str) -> None:
    config = configured([f"model={model}", f"parallel={parallel}", "data=tokens", "data.path=x"])
    p = config.parallel
    assert (
        p.dp_degree,
        p.mp_degree,
        p.pp_degree,
        p.sharding_degree,
        p.sharding_stage,
        derived.global_batch_size(config) // derived.replicas(config),
        config.trainer.micro_batch_size,
        derived.global_batch_size(config),
        config.model.recompute.value,
    ) == PRESETS[model, parallel]
    assert p.sequence_parallel is (parallel == "mp8_pp16")


@pytest.mark.parametrize("parallel", [name for name in options("parallel") if name != "auto"])
@pytest.mark.parametrize("model", options("model"))
def test_every_model_goes_with_every_parallel_preset(model: str, parallel: str) -> None:
    # Each file has values of its own section only, so a pair is the one's composition with the other's section.
    data = ("data=tokens", "data.path=x")
    config, choices = composed([f"model={model}", *data])
    config.parallel = composed([f"parallel={parallel}", *data])[0].parallel
    typed, problems = check(config, {**choices, "parallel": parallel})
    assert typed is not None
    # What cannot be divided is refused for the reason that it cannot be divided, and for no other.
    indivisible = typed.model.heads % typed.parallel.mp_degree or typed.model.layers % typed.parallel.pp_degree
    unit = derived.micro_batch_size(typed) * derived.replicas(typed)
    indivisible = indivisible or derived.global_batch_size(typed) % unit
    assert bool(problems) == bool(indivisible), problems
    assert all("not divisible" in p for p in problems)
    assert derived.padded_vocab(typed) % (128 * typed.parallel.mp_degree) == 0
    assert derived.world_size(typed) == typed.parallel.dp_degree * typed.parallel.sharding_degree * (
        typed.parallel.mp_degree * typed.parallel.pp_degree
    )


@pytest.mark.parametrize("group", ["data", "schedule", "logger", "debug", "experiment", "task"])
def test_every_other_option_composes(group: str) -> None:
    needed = {"text": ["data.path=x"], "tokens": ["data.path=x"], "blend": ["data.blend=[{path: a, weight: 1.0}]"]}
    for option in options(group):
        extra = needed.get(option, []) if group == "data" else ["data=tokens", "data.path=x"]
        extra += {"prepare": ["prepare.input=x", "prepare.output=x"], "export": ["export.output=x"]}.get(option, [])
        config, choices = composed([f"{group}={option}", *extra])
        assert check(config, choices)[1] == [], (group, option)


def test_an_experiment_loses_to_the_command_line_and_wins_over_groups() -> None:
    base = ["experiment=345m_release", "data=tokens", "data.path=x"]
    config = configured(base)
    assert (config.optimizer.lr, config.trainer.global_batch_size, config.model.name) == (3e-4, 128, "345m")
    assert configured([*base, "optimizer.lr=1e-3"]).optimizer.lr == 1e-3


def test_padded_vocabulary_follows_the_published_table() -> None:
    # GPT-2's 50257 tokens: 50304 rows on one device, 50432 at mp 2, 51200 at mp 8 (the published presets' numbers).
    for mp, rows in ((1, 50304), (2, 50432), (8, 51200)):
        config = configured(["model=124m", "model.vocab=50257", "model.heads=16", "data=tokens", "data.path=x"])
        config = derived.replace_in(config, {"parallel.mp_degree": mp})
        assert derived.padded_vocab(config) == rows


BAD = {
    "heads": (["model.heads=5"], "model.hidden=128 is not divisible by model.heads=5: try model.heads=4"),
    "batch": (["trainer.micro_batch_size=8", "trainer.global_batch_size=12"], "try 8 or 16"),
    "sequence": (["data.seq_len=512"], "data.seq_len=512 is longer than model.positions=128"),
    "vocabulary": (["data.vocab=5000"], "at most model.vocab=4096"),
    "bytes": (["data.vocab=200"], "at least 257"),
    "range": (["optimizer.lr=0"], "optimizer.lr=0.0: must be more than 0"),
    "steps": (["trainer.max_steps=0"], "trainer.max_steps=0: must be at least 1"),
    "dropout": (["model.dropout=1.0"], "model.dropout=1.0: a probability"),
    "floor": (["schedule.min_lr=1"], "schedule.min_lr=1.0 is above optimizer.lr"),
    "warm-up": (["schedule.warmup_steps=700"], "schedule.warmup_steps=700 is more than schedule.decay_steps=300"),
    "betas": (["optimizer.betas=[0.9]"], "optimizer.betas=[0.9]: two numbers"),
    "split": (["data.split=[0,1,0]"], "train above 0"),
    "exempt": (["model.no_recompute_layers=[1]"], "model.recompute=none"),
    "exempt range": (["model.recompute=full", "model.no_recompute_layers=[9]"], "layers are numbered 0 to 3"),
    "mp": (["parallel.mp_degree=3"], "model.heads=4 is not divisible by parallel.mp_degree=3"),
    "pp": (["parallel.pp_degree=3"], "model.layers=4 is not divisible by"),
    "interleaved": (["parallel.pp_degree=2", "parallel.virtual_pp_degree=2"], "at least 3, not 2"),
    "stage": (["parallel.pp_degree=2", "parallel.sharding_stage=2"], "use parallel.sharding_stage=1"),
    "no such stage": (["parallel.sharding_stage=4"], "parallel.sharding_stage=4: 1, 2 or 3"),
    "sequence parallel": (["parallel.sequence_parallel=true"], "parallel.mp_degree of at least 2"),
    "top p": (["generate.top_p=0"], "generate.top_p=0.0"),
    "prompt": (["generate.prompt=''"], "generate.prompt is empty"),
    "blend": (["data=blend", "data.blend=[{path: a, weight: -1}]"], "which must be more than 0"),
    "missing": (["data=text"], "data.path has no value: give one with data.path=..."),
    "negative": (["model.hidden=-1"], "model.hidden=-1: must be at least 1"),
    "prime": (["model.hidden=1000000007"], "try model.heads=1"),
    "added": (["+trainer.max_step=3"], "unknown key trainer.max_step (did you mean trainer.max_steps?)"),
    "removed": (["~data"], "no option of the group data is chosen"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_combination_is_named_with_its_remedy(case: str) -> None:
    overrides, expected = BAD[case]
    _, problems = check(*composed(overrides))
    assert any(expected in p for p in problems), problems


def test_all_problems_come_at_once() -> None:
    _, problems = check(*composed(["model.heads=5", "data.seq_len=512", "+typo=1", "optimizer.lr=-1"]))
    assert len(problems) >= 4


def test_every_key_of_the_schema_has_a_value_in_conf_or_is_optional() -> None:
    config = configured([])
    values = derived.plain(config)
    for key in known_keys():
        node = values
        for part in key.split("."):
            assert part in node, key
            node = node[part]


def test_plain_and_typed_are_inverse() -> None:
    config = configured(["model=1.3b", "data=blend", "data.blend=[{path: a, weight: 1.0}]"])
    assert derived.typed(derived.plain(config)) == config


def test_a_configuration_is_frozen() -> None:
    config = configured(["data=blend", "data.blend=[{path: a, weight: 1.0}]"])
    for section, key in ((config, "seed"), (config.device.peak_tflops, "fp32"), (config.data.blend[0], "path")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, key, None)
    other = derived.replace_in(config, {"seed": 3, "logger.wandb.name": "x"})
    assert (other.seed, other.logger.wandb.name, config.logger.wandb.name) == (3, "x", None)


def test_yaml_holds_values_only() -> None:
    for path in Path(ROOT / "conf").rglob("*.yaml"):
        assert "_target_" not in path.read_text(), path


def test_a_configuration_of_an_earlier_version_is_read_with_this_commands_values_for_new_keys() -> None:
    now = configured(["data=tokens", "data.path=x", "generate.top_k=7", "optimizer.lr=5e-4"])
    stored = derived.plain(configured(["data=tokens", "data.path=x", "optimizer.lr=2e-4"]))
    stored["generate"].pop("top_k")
    stored.pop("serve")
    stored["evaluate"]["max_batches"] = 3
    read = run_dir.stored_config(stored, now)
    assert (read.optimizer.lr, read.generate.top_k, read.serve) == (2e-4, 7, now.serve)
