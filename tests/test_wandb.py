"""One run is one curve at W&B, under its labels; training does not die of it; the dashboard shows what is logged."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, composed, configured, wandb_records
from omegaconf import OmegaConf

from gpt.config.derived import replace_in
from gpt.data.corpus import DatasetInfo, DatasetPart
from gpt.runs import wandb_run
from gpt.runs.run_dir import Job
from gpt.train.loggers.wandb import WandbLogger
from gpt.train.metrics import Meter, validation
from gpt.train.trainer import StepResult
from scripts import make_dashboard

DATA = DatasetInfo([DatasetPart("x", 1.0)], "f", None, None, None, 100, bytes_per_token=3.0)


def job(tmp_path: Path, *overrides: str) -> Job:
    return Job(configured(["data=tokens", "data.path=x", *overrides]), DATA, tmp_path, ["python", "-m", "gpt.main"])


class FakeWandb:
    """Records what W&B is asked; without a network, online fails."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.logged: list[int] = []
        self.alerts: list[str] = []
        self.references: list[str] = []
        self.summary: dict[str, Any] = {}
        self.broken, self.network = False, False
        self.resumed, self.step = False, 0
        self.Settings = dict

    def init(self, **arguments: Any) -> Any:
        self.asked.append(arguments)
        if arguments["mode"] == "online" and not self.network:
            raise TimeoutError("no network")
        return self

    def define_metric(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.broken:
            raise RuntimeError("W&B is broken")
        self.logged.append(step)

    def Artifact(self, *_: Any, **__: Any) -> Any:
        return self

    def add_reference(self, uri: str, **options: Any) -> None:
        assert options["checksum"] is False  # else all weights would be read
        self.references.append(uri)

    def log_artifact(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def alert(self, title: str, text: str, level: str) -> None:
        self.alerts.append(text)

    def finish(self, exit_code: int) -> None:
        """Nothing."""


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")
    return fake


# --- how the server is reached ---


def test_without_a_key_wandb_is_offline_and_asks_nothing(tmp_path: Path, wandb: FakeWandb) -> None:
    WandbLogger(job(tmp_path))
    assert [asked["mode"] for asked in wandb.asked] == ["offline"]


@pytest.mark.parametrize(("server", "mode"), [("", "offline"), ("https://wandb.mine.org:8080", "online")])
def test_a_key_counts_for_the_server_that_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: FakeWandb, server: str, mode: str
) -> None:
    (tmp_path / "netrc").write_text("machine wandb.mine.org login user password k\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", server)
    assert wandb_run.mode_now(configured([]).logger.wandb) == mode


def test_without_a_network_wandb_goes_on_offline_under_the_same_id(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    sink = WandbLogger(job(tmp_path, "tags=[mine]"))
    assert [asked["mode"] for asked in wandb.asked] == ["online", "offline"]
    first, second = wandb.asked
    assert first["id"] == second["id"] == (tmp_path / "wandb_id").read_text()
    assert first["resume"] == "allow"
    assert first["settings"]["init_timeout"] == 20
    assert "k" * 40 not in json.dumps(first, default=str)

    again = WandbLogger(job(tmp_path))
    assert wandb.asked[-1]["id"] == first["id"]
    assert again is not sink


def test_asked_for_online_wandb_says_why_it_cannot(tmp_path: Path, wandb: FakeWandb) -> None:
    with pytest.raises(TimeoutError):
        WandbLogger(job(tmp_path, "logger.wandb.mode=online"))


def test_a_broken_wandb_does_not_reach_the_training(
    tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = WandbLogger(job(tmp_path))
    wandb.broken = True
    sink.write({"step": 1, "train/loss": 1.0})
    sink.sampled(1)  # there is not even a samples.jsonl
    sink.saved(1)
    sink.close("done", 0)
    assert capsys.readouterr().err.count("WARNING: W&B: ") == 2
    assert wandb.summary["status"] == "done"


def test_an_end_that_needs_a_person_is_an_alert(tmp_path: Path, wandb: FakeWandb) -> None:
    WandbLogger(job(tmp_path)).close("done", 0)
    assert wandb.alerts == []
    WandbLogger(job(tmp_path)).close("guard", 3, "the loss of step 7 is nan")
    assert wandb.alerts == ["the loss of step 7 is nan"]
    assert wandb.summary["status"] == "guard"


# --- labels ---


def test_a_run_carries_what_it_is_found_and_grouped_by(tmp_path: Path, wandb: FakeWandb) -> None:
    overrides = ["parallel=dp2_mp2", "tags=[mine]", "logger.wandb.name='lr=1 seed=2'", "logger.wandb.group=grid"]
    WandbLogger(job(tmp_path, *overrides))
    (asked,) = wandb.asked
    assert (asked["name"], asked["group"], asked["job_type"]) == ("lr=1 seed=2", "grid", "pretrain")
    assert asked["tags"] == ["tiny", "fp32", "dp2_mp2", "4 ranks", "mine"]
    assert asked["config"]["choices"] == {
        "model": "tiny", "parallel": "dp2_mp2", "precision": "fp32", "ranks": 4, "data": "tokens"
    }  # fmt: skip
    assert asked["config"]["model"]["hidden"] == 128
    assert "${" not in json.dumps(asked["config"])
    WandbLogger(job(tmp_path))
    assert wandb.asked[-1]["name"] == tmp_path.name


@pytest.mark.parametrize(
    "preset", sorted({path.stem for path in (ROOT / "conf" / "parallel").glob("*.yaml")} - {"auto"})
)
def test_a_layout_is_called_as_its_preset(preset: str) -> None:
    parallel = composed([f"parallel={preset}"])[0].parallel
    assert wandb_run.layout(parallel).startswith(preset)  # sharding16 is stage 2, which it does not say


def test_cells_of_a_grid_are_a_group_with_names_and_lie_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpt.runs.grid import Cell
    from launchers import remote
    from launchers.sweep import compose, launch

    seeds = [f"seed={n}" for n in (1, 2)]
    cells = [Cell([seed], configured([seed]), tmp_path / seed, ["optimizer.lr=0.001", seed]) for seed in seeds]
    cells[1] = dataclasses.replace(cells[1], config=replace_in(cells[1].config, {"logger.wandb.name": "mine"}))
    monkeypatch.setattr(compose, "compose", lambda *_: cells)
    monkeypatch.setattr(remote, "prepared", lambda *_: {})

    labelled: list[Cell] = []

    def run(cells: list[Cell], *_: Any, **__: Any) -> None:
        labelled.extend(cells)
        raise KeyboardInterrupt  # nothing is to be started here

    monkeypatch.setattr("launchers.sweep.local_runner.run", run)
    master = OmegaConf.create(
        {
            "task": "pretrain",
            "grid": {"name": "study"},
            "hydra": {"sweep": {"dir": str(tmp_path)}, "overrides": {"task": ["seed=1,2"]}},
        }
    )
    with pytest.raises(KeyboardInterrupt):
        launch.launch(None, master, [[seed] for seed in seeds])
    there = [cell.config.logger.wandb for cell in labelled]
    assert [each.group for each in there] == ["study", "study"]
    assert [each.name for each in there] == ["lr=0.001 seed=1", "mine"]
    assert {each.links for each in there} == {str(tmp_path / "grids" / "study" / "wandb")}


def test_a_job_names_the_manifests_of_its_data(tmp_path: Path) -> None:
    (tmp_path / "a_manifest.json").write_text("{}")
    data = DatasetInfo(
        [DatasetPart(f"{tmp_path}/a", 1.0), DatasetPart(f"{tmp_path}/b", 1.0)], "f", None, None, None, 100
    )
    Job(configured([]), data, tmp_path, ["python"]).write()
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # printf {} | sha256sum
    assert json.loads((tmp_path / "job.json").read_text())["manifests"] == {f"{tmp_path}/a_manifest.json": digest}


# --- one curve ---


def records(path: Path, steps: range) -> None:
    lines = [json.dumps({"step": n, "tokens": 10 * n, "train/loss": 5 - n / 100}) + "\n" for n in steps]
    path.write_text("".join(lines))


def test_online_only_what_the_server_lacks_is_sent(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at 9, its checkpoint at 6. The server may be ahead of the checkpoint, or behind it."""
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    wandb.network = wandb.resumed = True
    records(tmp_path / "metrics.jsonl", range(1, 7))
    earlier = tmp_path / "wandb" / f"run-20260101_000000-{wandb_run.run_id(tmp_path)}"
    earlier.mkdir(parents=True)
    for there, sent in ((8, [9, 10]), (4, [5, 6, 7, 8, 9, 10])):
        wandb.step, wandb.logged = there + 1, []
        sink = WandbLogger(job(tmp_path))
        for step in range(7, 11):
            sink.write({"step": step})
        assert wandb.logged == sent
    assert earlier.exists()  # what it has is nowhere else here


KILLED = """
import os, signal
from pathlib import Path
from gpt.train.loggers.base import Jsonl
from gpt.runs.run_dir import Job
from gpt.train.loggers.wandb import WandbLogger
job = Job.read(Path({run_dir!r}))
sink, jsonl = WandbLogger(job), Jsonl(job.run_dir / "metrics.jsonl")
for step in range({first}, {last} + 1):
    for each in (jsonl, sink):
        each.write({{"step": step, "tokens": 10 * step, "train/loss": 5 - step / 100}})
sink.sampled(step)
if {kill}:
    os.kill(os.getpid(), signal.SIGKILL)
sink.close("done", 0)
"""


def start(run_dir: Path, first: int, last: int, *, kill: bool) -> None:
    code = KILLED.format(run_dir=str(run_dir), first=first, last=last, kill=kill)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == (-9 if kill else 0), done.stdout + done.stderr


def test_killed_past_its_checkpoint_and_resumed_a_run_is_one_folder_with_one_curve(tmp_path: Path) -> None:
    job(tmp_path, f"logger.wandb.links={tmp_path}/grid").write()
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "prompt": "a", "text": "b"}\n')
    (tmp_path / "checkpoints" / "step_00000020").mkdir(parents=True)
    start(tmp_path, 1, 29, kill=True)
    (killed,) = wandb_run.segments(tmp_path)
    # wandb sync puts a folder in place of what the server has, so the next one must hold it all, synced or not.
    (killed / f"run-{wandb_run.run_id(tmp_path)}.wandb.synced").touch()
    records(tmp_path / "metrics.jsonl", range(1, 21))  # cut back to the checkpoint, as a start does
    start(tmp_path, 21, 40, kill=False)
    (whole,) = wandb_run.segments(tmp_path)
    assert whole.name != killed.name
    found = wandb_records(whole)
    rows = [r["history"]["item"] for r in found if r["type"] == "history"]
    assert [row["_step"] for row in rows] == list(range(1, 41))
    assert [row["tokens"] for row in rows] == [10 * n for n in range(1, 41)]
    assert [row["train/loss"] for row in rows] == pytest.approx([5 - n / 100 for n in range(1, 41)])
    assert rows[-1]["samples.nrows"] == 1
    artifacts = [r["artifact"] for r in found if r["type"] == "artifact"]
    assert any("step_00000020" in artifact["aliases"] for artifact in artifacts)
    metrics = {
        r["metric"].get("name", r["metric"].get("glob_name")): r["metric"] for r in found if r["type"] == "metric"
    }
    assert metrics["*"]["step_metric"] == "tokens"
    assert metrics["val/loss"]["summary"] == {"min": True, "last": True}
    links = list((tmp_path / "grid").iterdir())  # what wandb leet shows for a grid: one entry, which leads somewhere
    assert [path.resolve() for path in links] == [whole.resolve()]


def test_offline_runs_are_offered_to_be_sent_until_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert wandb_run.commands(tmp_path / "wandb") == []
    for number in range(2):
        run_dir = tmp_path / f"run {number}"
        (run_dir / "wandb" / f"offline-run-20260101_00000{number}-abc").mkdir(parents=True)
        wandb_run.link(tmp_path / "grid" / "wandb", run_dir, "abc" if number else "*")
    assert [c for c, _ in wandb_run.commands(tmp_path / "run 0" / "wandb")] == [
        "wandb leet 'run 0/wandb'",
        "wandb sync 'run 0/wandb'",
    ]
    (tmp_path / "run 0" / "wandb" / "offline-run-20260101_000000-abc" / "run-abc.wandb.synced").touch()
    assert wandb_run.commands(tmp_path / "run 0" / "wandb") == []


# --- the dashboard ---


def logged_keys(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """All that a step and an evaluation record, where a peak is known and there is a loss scale."""
    monkeypatch.setattr("gpt.train.metrics.peak_here", lambda *_: 1e12)
    meter = Meter(configured([]))
    meter.start()
    return set(meter.record(1, StepResult(1.0, 1.0, 1e-3, 1024.0)) | validation(2.0, DATA)) - {"step"}


def dashboard() -> dict[str, Any]:
    made = make_dashboard.workspace("me", "gpt", "GPT runs", "lr_seed")
    found: dict[str, Any] = json.loads(made._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return found


def test_the_dashboard_draws_over_tokens_what_runs_record(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dashboard()["spec"]["section"]
    sections = {s["name"]: s["panels"] for s in spec["panelBankConfig"]["sections"] if s["panels"]}
    assert list(sections) == ["Loss", "Speed", "Optimizer", "Samples"]
    charts = [p["config"] for panels in sections.values() for p in panels if p["viewType"] == "Run History Line Plot"]
    assert {chart["xAxis"] for chart in charts} == {"tokens"}
    drawn = {key for chart in charts for key in chart["metrics"]}
    assert drawn == {
        "train/loss", "val/loss", "tokens_per_second", "mfu", "memory_peak_gib", "grad_norm", "lr", "loss_scale"
    }  # fmt: skip
    assert drawn | {"tokens"} <= logged_keys(monkeypatch)
    assert charts[0]["yLogScale"] is True
    assert f'"{make_dashboard.SAMPLES}"' in json.dumps(sections["Samples"])


def test_the_dashboard_groups_by_what_runs_carry(tmp_path: Path) -> None:
    (runs,) = dashboard()["spec"]["section"]["runSets"]
    groups = [each["name"].replace(".value.", ".") for each in runs["grouping"]]
    assert groups == ["choices.model", "choices.parallel"]
    config = wandb_run.about(job(tmp_path))["config"]
    for path in groups:
        node = config
        for word in path.split("."):
            node = node[word]
        assert isinstance(node, str)
    assert [(f["key"]["name"], f["value"]) for f in runs["filters"]["filters"]] == [("group", "lr_seed")]


def test_the_dashboard_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(SystemExit, match=r"gpt-runner\[dashboard\]"):
        make_dashboard.workspace("me", "gpt", "x", None)
