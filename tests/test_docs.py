"""Every command that the documents show is one that composes and passes the rules."""

from __future__ import annotations

import re
import shlex

import pytest
from conftest import ROOT, composed
from hydra.core.override_parser.overrides_parser import OverridesParser

from gpt import cli

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        for line in document.read_text(encoding="utf-8").splitlines():
            if line.startswith("$ "):
                continue  # shown for what it is told
            shown = re.findall(r"python -m gpt\.main[^`#|&]*", line)
            found += [(document.name, command.strip()) for command in shown]
    return found


def test_the_documents_show_commands() -> None:
    assert len(commands()) > 10


@pytest.mark.parametrize(("document", "command"), commands())
def test_a_documented_command_composes(document: str, command: str) -> None:
    words = shlex.split(command.replace("...", "x"))[3:]
    overrides = [w for w in words if not w.startswith("-")]
    if "-m" in words:
        overrides = [_first(o) for o in overrides]
    overrides = [o for o in overrides if not o.startswith("hydra.")]
    assert cli.resolve(*composed(overrides), overrides), command


def _first(override: str) -> str:
    """The first value of a sweep, or the lower end of what is searched."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return override
    start = getattr(parsed.value(), "start", None)
    return f"{parsed.key_or_group}={next(parsed.sweep_string_iterator()) if start is None else start}"


def test_links_lead_to_files() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_scripts_that_documents_name_exist() -> None:
    for document in DOCUMENTS:
        # A recipe's diff adds files; tests/test_new_task.py applies it.
        text = re.sub(r"```diff\n.*?```", "", document.read_text(), flags=re.DOTALL)
        for path in re.findall(r"\b(?:scripts|gpt|tests|launchers|conf)/[\w./]+\.\w+", text):
            assert (ROOT / path).exists(), f"{document.name}: {path}"


def test_the_table_of_what_goes_with_what_is_that_of_the_rules() -> None:
    from scripts import compatibility
    from scripts.compatibility import BASE, PAGE

    assert compatibility.table(cli.compose_job(BASE)) in PAGE.read_text(encoding="utf-8")
    assert compatibility.together(cli.compose_job(BASE), "mp", "pp") == []
    assert compatibility.together(cli.compose_job(BASE), "sharding 1", "sharding 2") is None
