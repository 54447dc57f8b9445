"""Rules, names and annotation of the semi-auto engine; what it computes is in test_parity.py."""

from __future__ import annotations

from typing import Any

import paddle.distributed as dist
import pytest
from conftest import SMALL, configured

from gpt import cli
from gpt.config import parameters
from gpt.config.cluster import Device
from gpt.config.derived import plain, replace_in
from gpt.config.parameters import parameter_shapes
from gpt.config.schema import EngineKind, Task
from gpt.parallel.semi_auto import MeshPlacement
from gpt.runs import run_dir
from gpt.runs.source import _for_inference
from gpt.utils.errors import UserError
from launchers import checks

STATIC = "parallel.static=true"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel=dp2", STATIC], "add parallel.engine=auto"),
        (["parallel=single", "parallel.engine=auto"], "all degrees are 1"),
        (["parallel=pp4", "parallel.virtual_pp_degree=2", "model.layers=8", "parallel.engine=auto"], "one stage"),
        (["parallel=auto_pp2", STATIC], "use parallel.static=false"),
        (["parallel=auto_mp2", "parallel.sequence_parallel=true"], "sequence_parallel"),
        (["parallel=auto_dp2", "parallel.sharding_degree=2"], "parallel.sharding_degree=4"),
        (["parallel=auto_dp2", "optimizer.offload=true"], "optimizer.offload"),
        (["parallel=auto_sharding2", "parallel.sharding_stage=2", STATIC], "use stage 1"),
        (["parallel=auto_dp2", "precision=bf16", STATIC], "float32"),
        (["parallel=auto_mp2", STATIC], "model.attention_dropout=0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_engine_is_not_asked_for_is_refused_with_a_remedy(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match="1 problem, nothing was started") as caught:
        configured([*SMALL, "trainer.global_batch_size=8", "trainer.micro_batch_size=1", *overrides])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel=auto_sharding2", "parallel.sharding_stage=3"],
        ["parallel=auto_dp2_mp2", STATIC, "model.attention_dropout=0"],
    ],
    ids=" ".join,
)
def test_what_has_no_kernel_on_a_cpu_is_refused_there(overrides: list[str]) -> None:
    config = configured([*SMALL, *overrides])
    config = replace_in(config, {"cluster.device": Device.cpu})
    assert any("needs a GPU" in problem for problem in checks.problems(config, 4))
    config = replace_in(config, {"task": Task.generate})
    assert not any("needs a GPU" in problem for problem in checks.problems(config, 4))


def test_a_run_of_fleet_is_named_as_before_there_was_a_choice_and_one_of_the_engine_differs() -> None:
    fleet, auto = (plain(configured([*SMALL, f"parallel={name}"])) for name in ("dp2", "auto_dp2"))
    before = {**fleet, "parallel": {k: v for k, v in fleet["parallel"].items() if k not in ("engine", "static")}}
    assert run_dir.run_name(fleet, "dp2") == run_dir.run_name(before, "dp2")
    assert run_dir.run_name(fleet, "x") != run_dir.run_name(auto, "x")


def test_every_line_of_the_annotation_is_of_a_parameter_and_divides_it() -> None:
    config = configured([*SMALL, "parallel=auto_mp2"])
    shapes = parameter_shapes(config)
    for name, shape in shapes.items():
        axis = parameters.parameter(name).tp_axis
        assert axis is None or shape[axis] % 2 == 0
    replicated = {name.rsplit(".", 2)[-2] for name in shapes if parameters.parameter(name).tp_axis is None}
    assert replicated == {"position", "norm", "norm1", "norm2", "out", "fc2"}  # of the last two the bias


@pytest.mark.parametrize(
    ("preset", "meshes"),
    [
        ("pp2", {0: [0], 1: [1]}),
        ("dp2_mp2_pp2", {0: [[0, 1], [4, 5]], 3: [[2, 3], [6, 7]], 6: [[2, 3], [6, 7]]}),
        ("sharding2_mp2_pp2", {0: [[0, 1], [2, 3]], 7: [[4, 5], [6, 7]]}),
    ],
)
def test_a_rank_places_tensors_on_the_ranks_of_its_stage_only(
    monkeypatch: pytest.MonkeyPatch, preset: str, meshes: dict[int, list[Any]]
) -> None:
    monkeypatch.setattr(dist.auto_parallel, "set_mesh", lambda mesh: None)
    parallel = cli.compose_job([f"parallel={preset}", "parallel.engine=auto"]).parallel
    for rank, ranks in meshes.items():
        placed = MeshPlacement.of(parallel, rank)
        assert placed.mesh.mesh.tolist() == ranks
        place = tuple(placed.place_of[name] for name in placed.mesh.dim_names)
        assert placed.mesh.mesh[place] == rank


def test_weights_are_read_under_fleet() -> None:
    assert _for_inference(configured([*SMALL, "parallel=auto_mp2"]).parallel).engine is EngineKind.fleet
