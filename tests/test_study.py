"""A search by Optuna: what is proposed, what is given up, and that it goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran, configured

from gpt.config.task_schemas import Optuna, Sampler
from gpt.utils.errors import UserError
from launchers.sweep import optuna_study
from launchers.sweep.optuna_study import Proposal, Study

Run = Callable[..., Ran]
SWEEPS = [
    "optimizer.lr=tag(log,interval(1e-4,1e-2))",
    "model.hidden=int(interval(64,128))",
    "model.layers=2,4",
    "seed=3",
]


def settings(**changes: Any) -> Optuna:
    return dataclasses.replace(configured([]).optuna, **changes)


def space(*sweeps: str, **named: str) -> optuna_study.Space:
    return optuna_study.split(list(sweeps), named, None)[0]


def values(proposal: Proposal) -> dict[str, float]:
    return {key: float(value) for key, value in (each.split("=") for each in proposal.overrides)}


def bowl(proposal: Proposal) -> float:
    """Lowest where the learning rate is 1e-3."""
    return abs(math.log10(values(proposal)["optimizer.lr"]) + 3)


def test_sweeps_are_read_as_on_the_command_line(tmp_path: Path) -> None:
    found, fixed = optuna_study.split(
        SWEEPS, {"optimizer.weight_decay": "interval(0,0.2)", "optimizer.lr": "1,2"}, None
    )
    assert fixed == ["seed=3"]
    assert list(found) == ["optimizer.lr", "model.hidden", "model.layers", "optimizer.weight_decay"]
    search = Study(tmp_path / "g", found, settings())
    tried = [values(search.ask()) for _ in range(20)]
    assert all(1e-4 <= each["optimizer.lr"] <= 1e-2 and 0 <= each["optimizer.weight_decay"] <= 0.2 for each in tried)
    assert {each["model.layers"] for each in tried} == {2, 4}
    assert all(each["model.hidden"].is_integer() and 64 <= each["model.hidden"] <= 128 for each in tried)
    assert sum(each["optimizer.lr"] < 1e-3 for each in tried) in range(5, 16)  # half of them: it is searched by its log


@pytest.mark.parametrize(
    ("sweeps", "words"),
    [
        (["seed=3"], "has nothing to search: give one, for example optimizer.lr="),
        (["optimizer.lr=tag(log,interval(0,1))"], "optimizer.lr=tag(log,interval(0,1)): cannot be searched: .*low"),
    ],
)
def test_what_cannot_be_searched_is_said(sweeps: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")):
        optuna_study.split(sweeps, {}, None)


def test_choices_that_change_within_a_study_are_refused_with_the_remedy(tmp_path: Path) -> None:
    Study(tmp_path / "g", space("model.layers=2,4"), settings()).ask()
    with pytest.raises(UserError, match=r"another name with grid\.name="):
        Study(tmp_path / "g", space("model.layers=2,4,6"), settings()).ask()


def test_a_search_finds_the_bottom_of_a_bowl_and_continues_where_it_was_stopped(tmp_path: Path) -> None:
    lr = space("optimizer.lr=tag(log,interval(1e-5,1e-1))")
    for trials in (12, 30):  # the second start is told to go on to more
        search = Study(tmp_path / "g", lr, settings(trials=trials))
        while proposals := optuna_study.feed(search, 1, lambda proposal: True):
            search.finish(proposals[0].number, bowl(proposals[0]))
        assert search.counts()["whole"] == trials
    best = search.best()
    assert best
    assert best[0] < 0.2
    seen = [trial.params["optimizer.lr"] for trial in search._study.get_trials()]
    assert len(set(seen)) == 30  # the second start does not propose the first one's trials again


def test_a_later_start_does_not_draw_the_first_trials_again(tmp_path: Path) -> None:
    lr, drawn = space("optimizer.lr=interval(0,1)"), []
    for trials in (3, 6):
        search = Study(tmp_path / "g", lr, settings(trials=trials, sampler=Sampler.random))
        while proposals := optuna_study.feed(search, 1, lambda proposal: True):
            search.finish(proposals[0].number, 1.0)
            drawn.append(proposals[0].overrides)
    assert len(set(drawn)) == 6


def test_a_trial_whose_driver_was_killed_is_offered_again_unless_somebody_is_at_it(tmp_path: Path) -> None:
    lr = space("optimizer.lr=interval(0,1)")
    killed = Study(tmp_path / "g", lr, settings(trials=3))
    first, second = optuna_study.feed(killed, 2, lambda proposal: True)

    later = Study(tmp_path / "g", lr, settings(trials=3))
    assert optuna_study.feed(later, 2, lambda proposal: proposal != first)[0] == second
    assert later.left() == 0  # it took the second again and asked for one new trial
    later.finish(second.number, 0.5)
    assert later.counts() == {"whole": 1, "pruned": 0, "failed": 0, "unfinished": 2}
    assert optuna_study.feed(Study(tmp_path / "g", lr, settings(trials=3)), 9, lambda proposal: proposal == first) == [
        first
    ]


def test_hopeless_trials_are_given_up_by_what_others_had_at_the_same_step(tmp_path: Path) -> None:
    found = space("optimizer.lr=interval(0,1)")
    search = Study(tmp_path / "g", found, settings(trials=20, prune=True, prune_from=10, reduction_factor=2))
    good, bad, late = (search.ask() for _ in range(3))

    def losses(*figures: float) -> list[dict[str, float]]:
        return [{"step": 10 * (i + 1), "train/loss": 9.0, "val/loss": loss} for i, loss in enumerate(figures)]

    assert not search.report(good.number, losses(3.0))
    assert search.report(bad.number, losses(4.0))
    assert not search.report(good.number, [{"step": 15, "train/loss": 8.0}, *losses(3.0, 2.5)])  # told once each
    assert not search.report(late.number, losses(2.0))  # a bad start of others does not harm it
    search.finish(bad.number, None, pruned=True)
    search.finish(good.number, 2.5)
    search.finish(late.number, None)
    assert search.counts() == {"whole": 1, "pruned": 1, "failed": 1, "unfinished": 0}
    assert search.best() == (2.5, good.overrides)
    never = Study(tmp_path / "h", found, settings(prune=False))
    one, two = never.ask(), never.ask()
    assert not never.report(one.number, losses(1.0))
    assert not never.report(two.number, losses(9.0))


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'gpt-runner\[optuna\]'"):
        optuna_study.optuna()


SEARCH = ["hparams=optuna", "grid.name=g", "optuna.prune_from=2", "optuna.reduction_factor=2", "trainer.eval_every=2"]


def events(folder: Path) -> list[tuple[str, int | None]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [(event["event"], event.get("code")) for event in map(json.loads, lines)]


@pytest.mark.slow
def test_a_search_goes_on_with_more_trials_and_trains_nothing_twice(gpt: Run, small: list[str], tmp_path: Path) -> None:
    job = [*small, *SEARCH, "optimizer.lr=1e-3,2e-3", "optuna.startup_trials=100"]
    alone = gpt(*small, "hparams=optuna")
    assert (alone.code, "hparams=optuna makes many runs: add -m" in alone.err) == (2, True)
    for trials, before in ((2, ""), (8, ", of which 2 whole before")):
        ran = gpt("-m", *job, f"optuna.trials={trials}")
        assert ran.code == 0, ran.text
        assert re.search(rf"trials +{trials}{before}\n", ran.out)
        assert re.search(rf"whole +{trials}\n", ran.out)
    two = sorted([("started", None), ("ended", 0)] * 2, key=str)
    assert sorted(events(tmp_path / "outputs/grids/g"), key=str) == two  # 8 trials, of 2 values


@pytest.mark.slow
def test_a_hopeless_trial_is_ended_while_it_runs_and_keeps_what_it_has(
    gpt: Run, small: list[str], tmp_path: Path
) -> None:
    folder, sweep = tmp_path / "outputs/grids/g", "optimizer.lr=interval(1e-5,1e-3)"
    earlier = Study(folder, space(sweep), settings(prune=True, prune_from=2, reduction_factor=2))
    good = earlier.ask()
    earlier.report(good.number, [{"step": 2, "val/loss": 0.1}])
    earlier.finish(good.number, 0.1)

    endless = [*small, *SEARCH, sweep, "optuna.prune=true", "optuna.trials=2", "trainer.max_steps=1000000"]
    ran = gpt("-m", *endless)
    assert ran.code == 0, ran.text
    assert events(folder) == [("started", None), ("pruned", 143)]
    assert "pruned: lr=" in ran.out
    assert len(list(tmp_path.glob("outputs/*/checkpoints/step_*"))) > 0
    assert earlier.counts() == {"whole": 1, "pruned": 1, "failed": 0, "unfinished": 0}
