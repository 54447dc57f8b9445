"""What is only shown: a script, a command per host, a manifest."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Ran
from slurm_stand_in import SLURM

from gpt import cli
from gpt.config.schema import Config
from launchers import kubernetes, nodes


@pytest.mark.slow
def test_a_dry_run_shows_the_script_without_slurm_and_leaves_nothing(
    gpt: Callable[..., Ran], small: list[str], tmp_path: Path
) -> None:
    shown = gpt(*small, *SLURM, "parallel=dp2", "dry_run=true", env={"PATH": str(tmp_path / "none")})
    assert shown.code == 0, shown.all
    assert shown.out.startswith("#!/bin/bash\n#SBATCH --job-name=gpt-tiny_dp2_")
    assert subprocess.run(["bash", "-n"], input=shown.out, text=True, check=False).returncode == 0
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_every_host_is_told_its_own_command() -> None:
    overrides = ["cluster=nodes", "cluster.hosts=[a,b]", "cluster.device=cpu", "parallel=dp8", "notes=two words"]
    found = nodes.commands(cli.compose_job(overrides), overrides, ROOT)
    assert [host for host, _ in found] == ["a", "b"]
    for rank, (_, command) in enumerate(found):
        assert f"--master a:29500 --nnodes 2 --rank {rank} --nproc_per_node 4 " in command
        assert " gpt/main.py " in command
        assert command.endswith(" cluster.device=cpu parallel=dp8 'notes=two words'")
        assert "cluster=nodes" not in command


def manifest(*more: str) -> dict[str, Any]:
    overrides = ["cluster=kubernetes", "cluster.image=registry/gpt:1", "parallel=dp8", "cluster.per_node=4", *more]
    config: Config = cli.compose_job(overrides)
    found: dict[str, Any] = yaml.safe_load(kubernetes.text([kubernetes.manifest(config, "tiny_dp8_0a1b", overrides)]))
    return found


def test_a_manifest_is_what_the_training_operator_takes() -> None:
    training = pytest.importorskip("kubeflow.training", reason="needs kubeflow-training")
    import kubernetes.client as core

    def fits(value: Any, kind: str, path: str) -> None:
        """Against the operator's and Kubernetes' own models, into which its schema was turned: names and types."""
        if kind.startswith("dict("):
            for key, each in value.items():
                fits(each, kind[5:-1].split(", ", 1)[1], f"{path}.{key}")
        elif kind.startswith("list["):
            for number, each in enumerate(value):
                fits(each, kind[5:-1], f"{path}[{number}]")
        elif kind in ("str", "int", "bool"):
            assert type(value).__name__ == kind, f"{path}: {value!r} is no {kind}"
        elif kind != "object":
            model = getattr(training, kind, None) or getattr(core, kind)
            attributes = {spelled: name for name, spelled in model.attribute_map.items()}
            for key, each in value.items():
                assert key in attributes, f"{path}: {kind} has no {key}"
                fits(each, model.openapi_types[attributes[key]], f"{path}.{key}")
            model(**{attributes[key]: each for key, each in value.items()})  # what is required

    made = manifest("cluster.claim=work", "cluster.secret=keys", "cluster.mem=64Gi", "cluster.namespace=ml")
    fits(made, "KubeflowOrgV1PaddleJob", "job")
    worker = made["spec"]["paddleReplicaSpecs"]["Worker"]
    worker["replica"] = worker.pop("replicas")
    with pytest.raises(AssertionError, match="has no replica"):
        fits(made, "KubeflowOrgV1PaddleJob", "job")


def test_a_manifest_has_a_pod_per_node_and_a_gpu_per_rank() -> None:
    worker = manifest()["spec"]["paddleReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    assert worker["replicas"] == 2
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert container["args"] == ["gpt", "parallel=dp8", "cluster.device=gpu"]
    assert kubernetes.HEAD.startswith("#")
    assert "not run here" in kubernetes.HEAD
