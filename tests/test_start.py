"""A run starts with the weights that it is given, and with nothing else of theirs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Ran, configured, metrics
from foreign import TOKENIZER, Stored

from gpt.config.cluster import Device
from gpt.config.derived import plain
from gpt.config.task_schemas import Split
from gpt.data import corpus, tokenizer
from gpt.data.dataset import TokenDataset
from gpt.parallel.topology import Topology
from gpt.runs.checkpoint import checkpoint, saver
from gpt.runs.run_dir import Job
from gpt.tasks.workers import pretrain
from gpt.train import optimizer
from gpt.train.trainer import Trainer


def engine_of(job: Job) -> Trainer:
    return Trainer(job.config, Topology(job.config.parallel, Device.cpu))


def test_given_weights_come_without_moments_and_own_checkpoints_win(small: list[str], tmp_path: Path) -> None:
    config = configured(small)
    data = corpus.prepare(config)
    job = Job(config, data, tmp_path / "run", [])
    first, samples = engine_of(job), TokenDataset(config, data, Split.train)
    for number in (1, 2, 3):
        first.step(number, samples)
    model, slots, rest = first.state()
    state = {"step": 3, "config": plain(config), "data": data.plain(), "data_fingerprint": data.fingerprint, **rest}
    saver.write_alone(tmp_path / "given", saver.CheckpointShard(3, model, slots, state))

    for offload in (False, True):
        theirs = dataclasses.replace(config.optimizer, offload=offload)
        given = dataclasses.replace(config, checkpoint=str(tmp_path / "given"), optimizer=theirs, seed=config.seed)
        job = Job(given, data, tmp_path / "run", [])
        second = engine_of(job)
        assert pretrain.restore(job, second) == 0
        assert all(np.array_equal(p.numpy(), model[name].array) for name, p in second.parameters.items())
        fresh = engine_of(job)
        for name, p in fresh.parameters.items():
            p.set_value(first.parameters[name])
        if not offload:
            wanted = fresh.step(1, samples).loss, fresh.step(2, samples).loss
        assert (second.step(1, samples).loss, second.step(2, samples).loss) == wanted

    (tmp_path / "run/checkpoints").mkdir(parents=True)
    own = saver.CheckpointShard(2, *second.state()[:2], {**state, "step": 2})
    saver.write_alone(checkpoint.folder_of(tmp_path / "run", 2), own)
    assert pretrain.restore(job, engine_of(job)) == 2


def test_float32_copies_of_an_optimizer_are_the_given_weights(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(small)
    data = corpus.prepare(config)
    model, _, _ = engine_of(Job(config, data, tmp_path, [])).state()
    state = {"step": 3, "config": plain(config)}
    saver.write_alone(tmp_path / "given", saver.CheckpointShard(3, model, {}, state))
    given = checkpoint.Checkpoint(tmp_path / "given").model()
    told: list[dict[str, np.ndarray]] = []
    monkeypatch.setattr(optimizer, "restore", lambda *arguments: told.append(arguments[3]))  # on a CPU they are shared
    for override, copies in (("optimizer.offload=false", 0), ("optimizer.offload=true", 1)):
        engine_of(Job(configured([*small, override]), data, tmp_path, [])).load(given, None, {})
        assert len(told) == copies
    assert all(np.array_equal(told[0][name], model[name].array) for name in model)


@pytest.mark.slow
def test_imported_weights_write_the_text_that_transformers_writes_and_start_a_run(
    gpt: Callable[..., Ran], tmp_path: Path
) -> None:
    reference = Stored()  # test_weights.py compares it with transformers itself
    shutil.copy(TOKENIZER, reference.save("2 heads", tmp_path / "hf"))
    text = "the cat sat on the mat and the dog saw the cat, and so on and so on.\n" * 200
    (tmp_path / "text.txt").write_text(text)
    assert gpt("task=import_weights", "import_weights.source=hf", "import_weights.output=out").code == 0

    asked = ["task=generate", "checkpoint=out", "prompt=the dog", "generate.temperature=0", "generate.max_new_tokens=9"]
    ran = gpt(*asked, "generate.output=said.jsonl")
    assert ran.code == 0, ran.text
    encoder = tokenizer.open_encoder(tmp_path / "out/tokenizer.json")
    row = reference.greedy("2 heads", encoder.encode("the dog").tolist(), 9)
    new = row[-9:][: row[-9:].index(0)] if 0 in row[-9:] else row[-9:]
    (said,) = (json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines())
    assert said["text"] == encoder.decode(new)

    prepare = ["task=prepare", "prepare.input=text.txt", "prepare.output=set", "prepare.document=line"]
    assert gpt(*prepare, "prepare.tokenizer=out/tokenizer.json").code == 0
    shape = ["model.vocab=300", "model.hidden=32", "model.heads=2", "model.layers=2", "model.positions=32"]
    train = [*shape, "data=tokens", "data.path=set", "checkpoint=out", "trainer.max_steps=2", "trainer.save_every=1"]
    train += ["schedule.warmup_steps=1", "trainer.global_batch_size=4", "hydra.run.dir=run"]
    ran = gpt(*train)
    assert ran.code == 0, ran.text
    assert "at step 0 with fresh moments" in ran.out
    first = metrics(tmp_path / "run")
    assert gpt(*train, "trainer.max_steps=3").code == 0
    again = metrics(tmp_path / "run")
    assert [r["train/loss"] for r in again[:2]] == [r["train/loss"] for r in first]
    assert again[2]["step"] == 3

    ran = gpt("task=export", "checkpoint=run", "export.format=paddle", "export.output=static")
    assert ran.code == 0, ran.text
    assert {path.name for path in (tmp_path / "static").glob("*.json")} >= {"step.json", "tokenizer.json"}
