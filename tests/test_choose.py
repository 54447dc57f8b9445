"""``parallel=auto``: the fastest that fits is taken, what the user gives is kept, the run is that of the degrees."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL, Ran, composed, configured

from gpt import cli
from gpt.config import derived
from gpt.config.cluster import Device
from gpt.config.derived import global_batch_size, plain, world_size
from gpt.config.schema import Config, Parallel, Recompute, degrees_name
from gpt.plan import auto_parallel, explain, search
from gpt.plan.explain import AutoParallelResult
from gpt.runs import run_dir, source
from gpt.tasks import plan
from gpt.utils import machine
from gpt.utils.console import Console
from gpt.utils.errors import UserError

Run = Callable[..., Ran]
A100 = ["device=a100_80", "precision=bf16"]
PLAN = ["task=plan", "parallel=auto"]
MEASURED = {"memory_gib": 16, "fp32_tflops": 0.1, "bandwidth_gb_s": 10, "link_gb_s": 1}


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same host for everybody: two cores, 16 GiB, measured."""
    (tmp_path / "device_cpu.json").write_text(json.dumps(MEASURED))
    monkeypatch.setenv("GPT_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(machine, "memory_gib", lambda: 16.0)


def resolved(*overrides: str) -> cli.ResolvedJob:
    return cli.resolve(*composed(list(overrides)), list(overrides))


def planned(*overrides: str) -> Config:
    return resolved(*PLAN, *overrides).config


def chosen(*overrides: str) -> AutoParallelResult:
    choice = resolved(*PLAN, *overrides).choice
    assert choice is not None
    return choice


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        planned(*overrides)
    assert str(error.value).startswith("1 problem, nothing was started:\n  - ")
    return str(error.value)


def name(*overrides: str) -> str:
    """Of the run directory, as Hydra's resolver makes it."""
    from hydra import compose, initialize_config_dir

    from gpt.utils.files import conf_dir

    with initialize_config_dir(config_dir=conf_dir(), version_base="1.3", job_name="gpt"):
        return Path(compose("config", list(overrides), return_hydra_config=True).hydra.run.dir).name


@pytest.mark.parametrize(("model", "devices"), [("1.3b", 8), ("175b", 128)])
def test_the_fastest_layout_that_fits_is_taken(model: str, devices: int) -> None:
    taken = planned(f"model={model}", f"plan.devices={devices}", *A100)
    best = search.search(taken, devices)[0]
    assert world_size(taken) == devices
    assert search.fits_memory(taken)
    assert (taken.parallel, taken.model.recompute) == (best.config.parallel, best.config.model.recompute)
    assert global_batch_size(taken) == {"1.3b": 64, "175b": 1536}[model]


def test_on_a_cpu_there_is_a_rank_per_core_and_the_run_is_that_of_the_preset() -> None:
    taken = configured(["parallel=auto"])
    assert taken.parallel == Parallel(1, 2, 2, 1, 1, 1, False)
    assert plain(taken) == plain(configured(["parallel=sharding2_stage2"]))
    assert name("parallel=auto") == name("parallel=sharding2_stage2")
    assert name("parallel=auto").startswith("tiny_sharding2_stage2_")


@pytest.mark.parametrize("model", ["tiny", "1.3b"])
def test_the_degrees_by_hand_are_the_same_run(model: str) -> None:
    job = [f"model={model}", *A100, "data=tokens", "data.path=x"]
    choice = chosen(*job, "plan.devices=8")
    by_hand = resolved(*job, *auto_parallel.equivalent_overrides(choice, choice.taken.parallel)).config
    assert by_hand.parallel == choice.taken.parallel
    names = [run_dir.run_name(plain(job), "x") for job in (by_hand, planned(*job, "plan.devices=8"))]
    assert names[0] == names[1]


def test_a_run_is_found_again_in_whatever_words_its_degrees_were_typed(tmp_path: Path) -> None:
    by_hand = ["parallel=single", "parallel.sharding_degree=2", "parallel.sharding_stage=2"]
    assert name(*by_hand).startswith("tiny_single_")
    there = tmp_path / "outputs" / name("parallel=auto")
    there.mkdir(parents=True)
    assert name(*by_hand).startswith("tiny_single_")  # a folder without a job is no run
    (there / "job.json").write_text("{}")
    assert name(*by_hand) == name("parallel=auto") == there.name
    assert name(*by_hand, "seed=2").startswith("tiny_single_")


def test_the_same_command_chooses_the_same() -> None:
    first = planned("model=1.3b", *A100)
    assert planned("model=1.3b", *A100) == first


KEPT = {
    "mp": (["parallel.mp_degree=4"], lambda job: job.parallel.mp_degree == 4),
    "pp and its rounds": (["parallel.pp_degree=4", "parallel.virtual_pp_degree=2"],
                          lambda job: (job.parallel.pp_degree, job.parallel.virtual_pp_degree) == (4, 2)),
    "stage": (["parallel.sharding_stage=3"], lambda job: job.parallel.sharding_stage == 3),
    "no sequence parallel": (["parallel.mp_degree=2", "parallel.sequence_parallel=false"],
                             lambda job: not job.parallel.sequence_parallel),
    "micro batch": (["trainer.micro_batch_size=2"], lambda job: job.trainer.micro_batch_size == 2),
    "recompute": (["model.recompute=full"], lambda job: job.model.recompute is Recompute.full),
    "batch": (["trainer.global_batch_size=24"], lambda job: job.trainer.global_batch_size == 24),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_what_the_user_gives_is_kept(case: str) -> None:
    overrides, kept = KEPT[case]
    taken = planned("model=1.3b", "plan.devices=8", *A100, *overrides)
    assert kept(taken)
    assert world_size(taken) == 8
    assert search.fits_memory(taken)


def test_what_an_experiment_gives_is_kept() -> None:
    taken = planned("experiment=345m_release", "plan.devices=16", *A100)
    asked = configured(["experiment=345m_release", "data=tokens", "data.path=x"])
    assert global_batch_size(taken) == global_batch_size(asked) == 128
    assert taken.model.recompute is asked.model.recompute


def test_nothing_fits_says_what_comes_nearest_and_what_would_help() -> None:
    small = ("model=13b", "device=v100_16", "precision=fp16", "plan.devices=8")
    said = refused(*small)
    # 12.9e9 parameters at 16 bytes are 24 GiB for each of 8.
    assert re.search(
        r"no layout of 8 x v100_16 fits 14\.0 GiB of v100_16: the nearest, mp8\+sp .* needs 2[4-6]\.", said
    )
    assert "optimizer.offload=true makes one fit" in said
    assert "on 16 such devices some fit" in said
    assert planned(*small, "optimizer.offload=true").optimizer.offload
    assert world_size(planned(*small[:3], "plan.devices=16")) == 16


def test_what_does_not_divide_is_named_with_what_would() -> None:
    assert "no layout of 7 cores is possible: model.layers=4" in refused("plan.devices=7")
    assert "leave parallel.mp_degree=3 away" in refused("parallel.mp_degree=3")
    said = refused("model=13b", *A100, "plan.devices=8", "model.recompute=none", "parallel.dp_degree=8")
    assert "without parallel.dp_degree=8 model.recompute=none there is one that fits" in said
    assert "parallel.mp_degree=0: must be at least 1" in refused("parallel.mp_degree=0")


def test_other_problems_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "choose", lambda *_: pytest.fail("searched for a job that cannot be"))
    with pytest.raises(UserError, match=r"try model\.heads=4") as error:
        planned("model.heads=5", "data.seq_len=512")
    assert str(error.value).startswith("2 problems")


def test_cores_that_do_not_divide_the_batch_are_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 6)
    assert world_size(planned()) == 4
    assert "4 of 6 cores of this host" in chosen().where


def test_a_host_that_was_not_measured_says_what_is_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "device_cpu.json").unlink()
    auto_parallel.show(chosen(), planned(), Console())
    shown = capsys.readouterr().out
    assert "assumed  device.bandwidth_gb_s=10; " in shown
    assert "times only compare" in shown
    assert "tokens/s" not in shown


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with eight GPUs."""
    monkeypatch.setattr(derived, "resolve_device", lambda config: Device.gpu)
    monkeypatch.setattr(machine, "gpus", lambda: 8)
    monkeypatch.setattr(machine, "gpu_name", lambda: "NVIDIA A100-SXM4-80GB")


def test_gpus_are_counted_and_looked_up_by_name(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    job = ["model=345m", "precision=bf16", "data=tokens", "data.path=x", "parallel=auto"]
    taken = resolved(*job).config
    assert taken.parallel == planned("model=345m", *A100, "plan.devices=8").parallel
    assert taken.device.name is None  # nothing was stated, and the run is the same
    monkeypatch.setattr(machine, "gpu_name", lambda: "Some GPU")
    with pytest.raises(UserError, match=r"how much memory Some GPU has is not known: .* device\.memory_gib"):
        resolved(*job)
    more = [*job, "device.memory_gib=24"]
    assert world_size(resolved(*more).config) == 8


def test_ranks_that_others_started_are_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"RANK": 0, "SIZE": 4, "LOCAL_RANK": 0, "LOCAL_SIZE": 4}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{key}", str(value))
    assert world_size(configured(["parallel=auto"])) == 4


def test_on_every_node_one_srun_task_has_all_gpus(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"STEP_ID": 0, "PROCID": 0, "STEP_NUM_TASKS": 2, "STEP_TASKS_PER_NODE": "1(x2)", "NODEID": 0, "LOCALID": 0}
    for key, value in step.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    assert world_size(configured(["model=345m", "data=tokens", "data.path=x", "parallel=auto"])) == 16


def test_a_server_is_one_replica_and_an_export_one_rank_of_the_same_run() -> None:
    assert world_size(configured(["parallel=auto", "task=serve"])) == 1
    two = configured(["parallel=auto", "task=serve", "parallel.mp_degree=2"])
    assert two.parallel.mp_degree == world_size(two) == 2
    assert world_size(configured(["parallel=auto", "task=export", "export.output=x"])) == 1
    assert name("parallel=auto", "task=serve") == name("parallel=auto")


def test_a_checkpoint_is_read_by_the_layout_of_its_own_model(monkeypatch: pytest.MonkeyPatch) -> None:
    there = configured(
        [
            *SMALL,
            "model.heads=1",
            "trainer.global_batch_size=1",
            "trainer.micro_batch_size=1",
            "data=tokens",
            "data.path=x",
        ]
    )
    monkeypatch.setattr(source, "config_of", lambda config: there)
    assert configured(["parallel=auto", "task=evaluate"]).parallel.dp_degree == 1  # the default model's: sharding 2
    taken = configured(["parallel=auto", "task=evaluate", "checkpoint=x"])
    assert taken.parallel.pp_degree == world_size(taken) == 2  # a head and a sample: there is nothing else to divide
    assert taken.model.heads == 4  # the command's own; that of the checkpoint is read with it


def test_every_sentence_says_what_the_other_spends(capsys: pytest.CaptureFixture[str]) -> None:
    job = resolved(*PLAN, "model=1.3b", "plan.devices=8", *A100)
    plan.show(job.config, Console(), [], job.choice)
    shown = capsys.readouterr().out
    assert "== parallel=auto: 209 layouts of 8 x a100_80 fit ==" in shown
    assert re.search(r"1 +\d\.\d% faster than 2, which spends .* of a step more on the update", shown)
    assert re.search(r"3 +\d\.\d% slower than 1: it spends .*; it needs \d\.\d GiB less", shown)
    assert "parallel=single parallel.sharding_degree=8 parallel.sharding_stage=2 model.recompute=none" in shown
    plan.show(configured(["task=plan"]), Console(), [])
    assert "parallel=auto" not in capsys.readouterr().out


def test_the_choice_reads_well_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    job = resolved(*PLAN, "model=175b", "plan.devices=128", *A100)
    auto_parallel.show(job.choice, job.config, Console())
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert max(map(len, shown.splitlines())) <= 80
    (row,) = [line for line in shown.splitlines() if line.startswith(" 1  sharding8/1 mp4+sp ")]
    assert len(row.split()) == 10  # every figure on one line


def test_a_grid_of_plans_chooses_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    cells: list[tuple[list[str], Config | list[str]]] = []
    for size in ("345m", "175b"):
        overrides = [*PLAN, f"model={size}", *A100]
        try:
            cells.append((overrides, resolved(*overrides).config))
        except UserError as error:
            cells.append((overrides, error.problems))
    plan.show_grid(cells, Console())
    shown = capsys.readouterr().out
    assert re.search(r"345m +sharding8/2 +64=1x8", shown)  # a node of the device that is stated
    assert re.search("not possible: model=175b: parallel=auto: no layout of 8 x a100_80 .* on 64 such devices", shown)


@pytest.mark.slow
def test_a_run_has_the_chosen_degrees_and_goes_on_under_the_same_command(
    gpt: Run, small: list[str], tmp_path: Path
) -> None:
    job = [*small, "parallel=auto", "plan.devices=2", "trainer.max_steps=4", "data.seq_len=32"]
    ran = gpt(*job)
    assert ran.code == 0, ran.text
    assert "== parallel=auto: " in ran.out
    (run,) = (tmp_path / "outputs").glob("tiny_*")
    degrees = Parallel(**json.loads((run / "job.json").read_text())["config"]["parallel"])
    assert world_size(dataclasses.replace(configured([]), parallel=degrees)) == 2
    assert run.name.startswith(f"tiny_{degrees_name(degrees)}_")
    again = gpt(*job)
    assert again.out.startswith("this run is done"), again.text
    refused = gpt(*small, "parallel=auto", "plan.devices=7")
    assert refused.code == 2
    assert "no layout of 7 cores with trainer.micro_batch_size=4 is possible" in refused.err
    assert [path.name for path in (tmp_path / "outputs").glob("tiny_*")] == [run.name]
