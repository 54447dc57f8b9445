"""The page about many runs: the frontier of sizes, curves, and that any browser can open it anywhere."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import curve, run_folder

from gpt.runs.report import collect, page, report, summary


def sweep(folder: Path) -> summary.Summary:
    for hidden, end in ((64, 4.0), (128, 3.5), (256, 3.0)):
        run_folder(folder / str(hidden), {"model.hidden": hidden, "model.ffn": 4 * hidden}, curve(end))
    return summary.summarise(collect.find(folder))


def test_the_frontier_falls_and_no_curve_is_below_it(tmp_path: Path) -> None:
    found = sweep(tmp_path).sizes
    assert found
    assert len(found.sizes) == 3
    losses = [point.loss for point in found.frontier]
    assert losses == sorted(losses, reverse=True)
    for row in sweep_rows(tmp_path):
        cost = row.run.flops_per_token()
        for tokens, loss in zip(row.run.columns["tokens"], row.run.columns["val/loss"], strict=True):
            cheaper = [point.loss for point in found.frontier if point.flops <= tokens * (cost or 0)]
            assert math.isnan(loss) or min(cheaper) <= loss


def sweep_rows(folder: Path) -> list[summary.Row]:
    return summary.summarise(collect.find(folder)).rows


def test_a_power_law_is_fitted_through_three_sizes_and_not_through_two(tmp_path: Path) -> None:
    found = sweep(tmp_path).sizes
    assert found
    assert found.fit
    a, b = found.fit
    logs = [(math.log(p.flops), math.log(p.loss)) for p in found.fitted]
    assert len(logs) == 3
    slope, start = np.polyfit(*zip(*logs, strict=True), 1)
    assert (a, b) == pytest.approx((math.exp(start), -slope))
    shutil.rmtree(tmp_path / "64")
    two = summary.summarise(collect.find(tmp_path)).sizes
    assert two
    assert two.fit is None


# ---- the page ----


class Page(HTMLParser):
    """What a browser would find: scripts, rows, links, and whether every element is closed in order."""

    VOID = ("meta", "input", "br", "rect", "circle", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.logs = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        if self.open and self.open[-1] == "pre":
            self.logs += data

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


EVIL = "</script><script>alert(1)</script><b>&amp;"


@pytest.fixture
def pages(tmp_path: Path) -> Page:
    run_folder(tmp_path / "a & b", {"data.path": EVIL, "seed": 1}, curve(3.0))
    run_folder(tmp_path / "c", {"data.path": "text", "seed": 2}, curve(3.5))
    failed = run_folder(tmp_path / "d", {"data.path": "text", "seed": 3}, curve(3.5)[:7], result=None)
    (failed / "logs" / "worker.0.log").write_text(f"{EVIL} is what it said\n")
    report.write(tmp_path, tmp_path)
    return Page((tmp_path / "report.html").read_text())


def test_the_page_is_whole_and_text_of_the_user_is_only_text(pages: Page) -> None:
    assert pages.open == []
    assert [attrs.get("type") for tag, attrs in pages.seen if tag == "script"] == ["application/json", None]
    assert pages.logs == f"{EVIL} is what it said"
    values = {key["name"]: key["values"] for key in pages.data["keys"]}
    assert EVIL in values["data.path"]


def test_the_page_needs_no_network(pages: Page, tmp_path: Path) -> None:
    for tag, attrs in pages.seen:
        assert "src" not in attrs
        assert tag not in ("link", "iframe", "img"), tag
        assert "://" not in (attrs.get("href") or "")
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"\bfetch\(|XMLHttpRequest|@import|url\((?!#)", text)
    assert str(tmp_path) not in text


def test_every_link_leads_to_a_file(pages: Page, tmp_path: Path) -> None:
    from urllib.parse import unquote

    links = [attrs["href"] or "" for tag, attrs in pages.seen if tag == "a"]
    assert len(links) == 4  # three runs and a log
    assert all((tmp_path / unquote(link)).exists() for link in links)


def test_the_script_gets_every_curve_and_the_table_every_run(pages: Page) -> None:
    rows = [attrs for tag, attrs in pages.seen if tag == "tr" and "data-run" in attrs]
    assert [row["data-run"] for row in rows] == ["0", "1", "2"]
    first = pages.data["runs"][0]
    assert first["train"]["step"] == list(range(1, 51))
    assert first["train"]["loss"][-1] == 3.0
    assert first["train"]["seconds"][-1] == 25.0
    assert first["val"]["step"] == [10, 20, 30, 40, 50]
    assert first["tokens_per_step"] == 2048
    assert "sizes" in pages.data
    assert pages.data["sizes"] is None


def test_values_have_few_digits_unless_they_would_be_the_same(tmp_path: Path) -> None:
    for name, lr, eps in (("a", 0.0031622776, 1.00001e-8), ("b", 0.0131622776, 1.00002e-8)):
        run_folder(tmp_path / name, {"optimizer.lr": lr, "optimizer.eps": eps}, curve(3.0))
    report.write(tmp_path, tmp_path)
    keys = {key["name"]: key["values"] for key in Page((tmp_path / "report.html").read_text()).data["keys"]}
    assert keys == {"optimizer.lr": ["0.003162", "0.01316"], "optimizer.eps": ["1.00001e-08", "1.00002e-08"]}


def test_names_in_the_script_are_names_on_the_page(pages: Page) -> None:
    ids = {attrs["id"] for _, attrs in pages.seen if attrs.get("id")}
    wanted = set(re.findall(r'\$\("#([\w-]+)', pages.scripts[1])) - {"compute"}  # two sizes have that picture
    assert wanted <= ids


def test_a_long_run_is_thinned_to_means_that_keep_its_ends(tmp_path: Path) -> None:
    losses = [8.0 - k / 5000 + (-1) ** k for k in range(5000)]
    run_folder(tmp_path / "a", {"trainer.max_steps": 5000}, losses, result=None)
    (run,) = collect.find(tmp_path).runs
    thin = page.thinned(run, page.share(200))["train"]
    assert len(thin["step"]) <= page.MOST
    assert (thin["step"][0], thin["step"][-1]) == (1, 5000)
    assert thin["loss"][-2] == pytest.approx(7.0, abs=0.2)  # the saw of height 2 is gone
    assert thin["seconds"][-1] == 2500
    assert page.share(200) * 200 * 2 * 3 * 8 < 5e6  # two curves of three numbers: bytes
