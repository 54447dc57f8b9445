"""The command line: bad input gets one message with the remedy and exit code 2, and nothing is created."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Ran

pytestmark = pytest.mark.slow
Run = Callable[..., Ran]

BAD = {
    "a typo": (["modle=1.3b"], ["unknown key modle (did you mean model?)"]),
    "a typo below": (["model.hiden=3"], ["unknown key model.hiden (did you mean model.hidden?)"]),
    "several": (
        ["model.hiden=3", "trainer.max_step=4", "model=2b", "optimizer.lr=fast"],
        [
            "4 problems",
            "model.hidden?",
            "trainer.max_steps?",
            "model=2b: no such model; there are 1.3b, 124m, 13b, 175b, 345m, 6.7b, tiny",
            "optimizer.lr=fast: Value 'fast' of type 'str' could not be converted to Float",
        ],
    ),
    "a near option": (["parallel=dp-8"], ["no such parallel (did you mean dp8?)"]),
    "a wrong type": (["trainer.max_steps=many"], ["trainer.max_steps=many", "could not be converted to Integer"]),
    "a wrong choice": (["precision.dtype=fp8"], ["precision.dtype=fp8", "fp32"]),
    "no equals sign": (["trainer.max_steps"], ["trainer.max_steps"]),
    "an added key": (["+typo=1"], ["unknown key typo"]),
    "a removed group": (["~data"], ["no option of the group data is chosen"]),
    "a missing value": (["data=text"], ["data.path has no value: give one with data.path=..."]),
    "a missing file": (["data=text", "data.path=nowhere"], ["data.path=nowhere: not found"]),
    "missing token files": (["data=tokens", "data.path=nowhere/x"], ["no such token file", "nowhere/x_ids.npy"]),
    "a sweep without -m": (["model=345m,1.3b"], ["Ambiguous"]),
    "a sharding stage": (
        ["parallel=sharding2_mp2_pp2", "parallel.sharding_stage=2"],
        ["parallel.sharding_stage=2 does not go with parallel.pp_degree=2", "use parallel.sharding_stage=1"],
    ),
    "half precision": (["precision=bf16"], ["precision=bf16 needs a GPU", "use precision=fp32"]),
    "no GPU": (["cluster.device=gpu"], ["cluster.device=gpu"]),
    "a task without a run": (["task=generate"], ["no run here (no job.json); train first"]),
    "rules": (["model.heads=5", "data.seq_len=512"], ["2 problems", "try model.heads=4", "set data.seq_len=128"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_said_once_with_its_remedy_and_leaves_nothing(gpt: Run, tmp_path: Path, case: str) -> None:
    arguments, expected = BAD[case]
    ran = gpt(*arguments)
    assert ran.code == 2, ran.text
    for words in expected:
        assert words in ran.err, ran.err
    assert "Traceback" not in ran.text
    assert ran.out == ""
    assert os.listdir(tmp_path) == []


def test_damaged_data_is_found_before_anything_is_created(gpt: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "x_ids.npy", np.array([1, 2, 9999], np.uint16))
    np.savez(tmp_path / "x_idx.npz", lens=np.array([3], np.int32), docs=np.array([0, 1]))
    ran = gpt("data=tokens", "data.path=x")
    assert ran.code == 2
    assert "token id 9999 is beyond model.vocab=4096" in ran.err
    (tmp_path / "x_idx.npz").write_bytes(b"damaged")
    ran = gpt("data=tokens", "data.path=x")
    assert ran.code == 2
    assert "the token files are damaged" in ran.err
    assert sorted(os.listdir(tmp_path)) == ["x_ids.npy", "x_idx.npz"]


def test_a_text_too_short_for_a_sample_is_an_error_before_anything_is_created(gpt: Run, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a few words\n" * 100)
    for mode in ([], ["-m"]):
        ran = gpt(*mode, "data=text", "data.path=x.txt")
        assert ran.code == 2, ran.text
        assert "too few for one sample of data.seq_len=128" in ran.err
        assert "job.json" not in str(list(tmp_path.rglob("*")))
    assert not (tmp_path / "outputs" / "tiny*").exists()


def test_a_plan_needs_neither_paddle_nor_a_device(gpt: Run, tmp_path: Path) -> None:
    (tmp_path / "paddle.py").write_text("raise RuntimeError('imported')")
    ran = gpt("task=plan", "model=175b", "parallel=mp8_pp16", env={"PYTHONPATH": f"{ROOT}:{tmp_path}"})
    assert ran.code == 0, ran.text
    assert "174,603,264,000" in ran.out
    assert "128 = mp 8 x pp 16" in ran.out
    assert os.listdir(tmp_path) == ["paddle.py"]


def test_without_paddle_the_command_says_how_to_get_it(tmp_path: Path) -> None:
    code = (
        "import importlib.metadata as m, importlib.util as u, sys\n"
        "version, find = m.version, u.find_spec\n"
        "def gone(name):\n"
        "    if name.startswith('paddle'): raise m.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "m.version, u.find_spec = gone, lambda n, *a: None if n == 'paddle' else find(n, *a)\n"
        "sys.argv = ['gpt']\n"
        "from gpt.main import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "PaddlePaddle is not installed: pip install" in done.stderr
    assert os.listdir(tmp_path) == []


def test_help_is_for_newcomers(gpt: Run) -> None:
    ran = gpt("--help")
    assert ran.code == 0
    for words in ("task=generate", "model: 1.3b, 124m, 13b, 175b, 345m, 6.7b, tiny", "trainer.resume=never"):
        assert words in ran.out


def test_the_configuration_can_be_printed_resolved(gpt: Run, tmp_path: Path) -> None:
    ran = gpt("--cfg", "job", "--resolve", "model=1.3b")
    assert ran.code == 0
    assert "hidden: 2048" in ran.out
    assert "ffn: 8192" in ran.out
    assert "${" not in ran.out
    assert os.listdir(tmp_path) == []


def test_the_command_runs_as_a_file_too(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "gpt" / "main.py"), "task=plan"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout


def test_a_grid_runs_every_cell_into_its_own_run_and_resumes(gpt: Run, small: list[str], tmp_path: Path) -> None:
    grid = ["-m", *small, "trainer.max_steps=2", "optimizer.lr=1e-3,2e-3"]
    assert gpt(*grid).code == 0
    done = sorted((tmp_path / "outputs").glob("tiny_single_*/result.json"))
    assert len(done) == 2
    assert [json.loads(p.read_text())["status"] for p in done] == ["done", "done"]
    ran = gpt(*grid)
    assert "2: 2 done before" in ran.out
    assert "started" not in ran.out


def test_the_console_script_completes(gpt: Run) -> None:
    import shutil

    script = shutil.which("gpt")
    if script is None:
        ran = gpt("-sc", "install=bash")  # the same code path; the script exists once the project is installed
        assert "complete" in ran.out
        return
    done = subprocess.run([script, "-sc", "install=bash"], capture_output=True, text=True, check=True)
    assert "complete" in done.stdout


COUNTED = """
import collections, sys
from gpt import cli, main
from gpt.plan import auto_parallel, explain
calls = collections.Counter()
def count(module, name):
    function = getattr(module, name)
    def call(*arguments):
        calls[name] += 1
        return function(*arguments)
    setattr(module, name, call)
for module, name in ((auto_parallel, "resolve_auto"), (explain, "choose"), (cli, "check"), (cli, "run_name")):
    count(module, name)
main.driver.run = lambda job, run_dir, _, choice: print(run_dir.name, job.parallel == choice.taken.parallel)
try:
    main.main()
finally:
    print(*calls.values())
"""


def test_a_command_is_resolved_checked_and_named_once(small: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", COUNTED, *small, "parallel=auto", "plan.devices=2"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    name, same, *counts = ran.stdout.split()
    assert (name[:5], same, counts) == ("tiny_", "True", ["1"] * 4), ran.stderr
