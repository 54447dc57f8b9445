"""A manifest for Kubeflow's training operator: a PaddleJob (kubeflow.org/v1), one pod per node. Nothing is started."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import yaml

from gpt.config import cluster_rules
from gpt.config.cluster import Device
from gpt.config.schema import Config
from launchers import nodes

HEAD = "# Rendered by gpt cluster=kubernetes, checked against the operator's schema, not run here.\n"
PORT = 37777  # the operator's, named master
LONGEST = 50  # of a name: the operator makes pods NAME-worker-0, and labels end at 63


def named(name: str) -> str:
    """A name as Kubernetes wants it.

    Example:
        >>> named("1.3b_dp8_0a1b2c3d")
        'gpt-1-3b-dp8-0a1b2c3d'
    """
    return "gpt-" + re.sub("[^a-z0-9]+", "-", name.lower())[-LONGEST:].strip("-")


def manifest(config: Config, name: str, given: Iterable[str]) -> dict[str, Any]:
    """The job's manifest.

    The operator tells the pods PADDLE_MASTER and PADDLE_NNODES, which paddle.distributed.launch reads; it starts the
    program ``gpt`` that installing this project makes.

    Args:
        config: checked.
        name: of the run.
        given: overrides of the command.
    """
    cluster, ranks = config.cluster, cluster_rules.ranks_per_node(config)
    mount = cluster.mount or "/work"
    limits: dict[str, Any] = {"cpu": str(cluster.cpus or ranks)}
    if cluster.mem:
        limits["memory"] = cluster.mem
    if cluster.device is Device.gpu:
        limits["nvidia.com/gpu"] = str(ranks)
    launch = ["python", "-m", "paddle.distributed.launch", "--nproc_per_node", str(ranks), "--log_dir", "/tmp/launch"]
    container: dict[str, Any] = {
        "name": "paddle",  # the operator looks for this one
        "image": cluster.image,
        "workingDir": mount,
        "command": launch,
        "args": ["gpt", *nodes.overrides(given, config)],
        "ports": [{"name": "master", "containerPort": PORT}],
        "env": [{"name": "GPT_CACHE", "value": f"{mount}/cache"}],
        "resources": {"limits": limits},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    if cluster.secret:
        container["envFrom"] = [{"secretRef": {"name": cluster.secret}}]
    if cluster.claim:
        container["volumeMounts"].append({"name": "work", "mountPath": mount})
        volumes.append({"name": "work", "persistentVolumeClaim": {"claimName": cluster.claim}})
    about = {"name": named(name), **({"namespace": cluster.namespace} if cluster.namespace else {})}
    worker = {
        "replicas": cluster_rules.nodes(config),
        "restartPolicy": "OnFailure",
        "template": {
            # From SIGTERM to SIGKILL: a step, and a checkpoint.
            "spec": {"terminationGracePeriodSeconds": 120, "containers": [container], "volumes": volumes}
        },
    }
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PaddleJob",
        "metadata": about,
        "spec": {
            "runPolicy": {"cleanPodPolicy": "None", "backoffLimit": config.grid.retries},
            "paddleReplicaSpecs": {"Worker": worker},
        },
    }


def text(manifests: Iterable[dict[str, Any]]) -> str:
    """All of them as one file."""
    return HEAD + "---\n".join(yaml.safe_dump(each, sort_keys=False, width=120) for each in manifests)
