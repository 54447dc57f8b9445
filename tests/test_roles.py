"""Who started a process, and its place among the others, read from the environment."""

from __future__ import annotations

import pytest

from gpt.utils import launch_env
from gpt.utils.errors import UserError
from gpt.utils.launch_env import LaunchEnvironment
from launchers import rank_env

PADDLE_ENV = {
    "PADDLE_TRAINER_ID": "3",
    "PADDLE_CURRENT_ENDPOINT": "10.0.0.2:5001",
    "PADDLE_TRAINER_ENDPOINTS": "10.0.0.1:5000,10.0.0.1:5001,10.0.0.2:5000,10.0.0.2:5001",
    "PADDLE_TRAINERS_NUM": "4",
    "PADDLE_LOCAL_RANK": "1",
    "PADDLE_LOCAL_SIZE": "2",
    "PADDLE_NNODES": "2",
    "PADDLE_MASTER": "10.0.0.1:6000",
    "FLAGS_selected_gpus": "5",
}
SLURM_ENV = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
}
MPI_ENV = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
ROLES = {
    "nothing": ({}, LaunchEnvironment()),
    "a batch script": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, LaunchEnvironment()),
    "a step of one task": ({**SLURM_ENV, "SLURM_STEP_NUM_TASKS": "1"}, LaunchEnvironment()),
    "an interactive step": ({**SLURM_ENV, "SLURM_STEP_ID": "interactive"}, LaunchEnvironment()),
    "a rank alone in the environment": ({"PADDLE_TRAINER_ID": "0", "PADDLE_TRAINERS_NUM": "2"}, LaunchEnvironment()),
    "one MPI process": ({**MPI_ENV, "OMPI_COMM_WORLD_SIZE": "1"}, LaunchEnvironment()),
    "paddle": (PADDLE_ENV, LaunchEnvironment(launch_env.PADDLE, 3, 4, 1, 2)),
    "srun": (SLURM_ENV, LaunchEnvironment(launch_env.SLURM, 2, 3, 0, 1)),
    "mpirun": (MPI_ENV, LaunchEnvironment(launch_env.MPI, 1, 2, 1, 2)),
    "mpirun in a Slurm batch script": (
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", **MPI_ENV},
        LaunchEnvironment(launch_env.MPI, 1, 2, 1, 2),
    ),
}


@pytest.mark.parametrize("case", ROLES)
def test_the_role_is_read_from_the_environment(case: str) -> None:
    env, expected = ROLES[case]
    assert launch_env.detect(env) == expected


def test_places_given_by_launchers() -> None:
    of_paddle = rank_env.place(launch_env.detect(PADDLE_ENV), PADDLE_ENV, gpu=True).variables()
    assert of_paddle == {**of_paddle, **PADDLE_ENV}
    of_slurm = rank_env.place(launch_env.detect(SLURM_ENV), SLURM_ENV, hosts=lambda nodes: ["n1", "n2"])
    assert [e.split(":")[0] for e in of_slurm.endpoints] == ["n1", "n1", "n2"]
    assert of_slurm.master.startswith("n1:")
    assert of_slurm.nodes == 2
    first = {**SLURM_ENV, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    same = rank_env.place(launch_env.detect(first), first, hosts=lambda nodes: ["n1", "n2"])
    assert (same.endpoints, same.master) == (of_slurm.endpoints, of_slurm.master)
    other = {**SLURM_ENV, "SLURM_JOB_ID": "78"}
    assert rank_env.place(launch_env.detect(other), other, hosts=lambda nodes: ["n1", "n2"]).master != of_slurm.master
    of_mpi = rank_env.place(launch_env.detect(MPI_ENV), MPI_ENV)
    assert of_mpi.variables()["PADDLE_TRAINERS_NUM"] == "2"
    assert len({*of_mpi.endpoints, of_mpi.master}) == 3
    apart = {**MPI_ENV, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    with pytest.raises(UserError, match="-x PADDLE_MASTER=HOST_OF_RANK_0"):
        rank_env.place(launch_env.detect(apart), apart)


def test_proxies_that_paddle_launch_puts_away_come_back() -> None:
    env = {
        "https_proxy_original": "http://proxy:3128",
        "http_proxy_original": "http://other:1",
        "http_proxy": "http://own:1",
    }
    rank_env.restore_proxies(env)
    assert (env["https_proxy"], env["http_proxy"]) == ("http://proxy:3128", "http://own:1")
    alone = {"HOME": "/"}
    rank_env.restore_proxies(alone)
    assert alone == {"HOME": "/"}


def test_a_world_that_is_not_the_product_of_the_degrees_is_refused() -> None:
    role = LaunchEnvironment(launch_env.MPI, 0, 2, 0, 2)
    assert role.problems(2, "2 = dp 2") == []
    (problem,) = role.problems(4, "4 = dp 2 x mp 2")
    assert "mpirun started 2 rank(s), but the degrees of parallel need 4 = dp 2 x mp 2: start 4" in problem
    assert LaunchEnvironment().problems(4, "4 = dp 4") == []
