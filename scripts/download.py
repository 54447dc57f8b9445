"""Download the published sample set of 300 million tokens, or the files that another list names.

    python scripts/download.py
    python scripts/download.py address=https://mirror.example/gpt/ folder=corpora

Address, folder, and the size and SHA-256 of each file come from conf/sample.yaml, or key=value overrides of it. A
broken connection is resumed where it broke.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt.data import download, token_files  # noqa: E402
from gpt.utils.errors import UserError  # noqa: E402
from gpt.utils.files import conf_dir  # noqa: E402

TRIES, PAUSE_SECONDS = 6, 1.0


def run(overrides: Sequence[str]) -> None:
    """Download and check every file of the list; then open the set.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    base = OmegaConf.load(Path(conf_dir()) / "sample.yaml")
    OmegaConf.set_struct(base, True)
    try:
        settings = OmegaConf.merge(base, OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise UserError(f"{error}; keys: {', '.join(map(str, base))}") from error
    folder = Path(str(settings.folder))
    for file in settings.files:
        path, address = folder / file.name, str(settings.address).rstrip("/") + "/" + file.name
        known = download.remember(path) if not path.exists() else download.Expected()
        expected = download.Expected(
            known.bytes if file.bytes is None else file.bytes, known.sha256 if file.sha256 is None else file.sha256
        )
        print(f"{address} -> {path}", flush=True)
        fresh = download.fetch(
            address, path, expected, lambda line: print(f"  {line}", flush=True), tries=TRIES, pause=PAUSE_SECONDS
        )
        recorded = download.remember(path)
        if problem := recorded.problem(path):
            raise UserError(f"{path}: {problem}, as noted when it was downloaded: remove it to download it again")
        checked = "checked" if file.sha256 else "no published SHA-256 to check; noted"
        print(
            f"  {'downloaded' if fresh else 'there already'}, {recorded.bytes:,} bytes, {recorded.sha256} ({checked})"
        )
    for prefix in token_files.prefixes_at(str(folder)):
        token_set = token_files.load(prefix)
        print(f"data=tokens data.path={prefix}: {len(token_set.ids):,} tokens in {token_set.documents:,} documents")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 2 if a file cannot be downloaded."""
    overrides = list(sys.argv[1:] if arguments is None else arguments)
    if any(o.startswith("-") or "=" not in o for o in overrides):
        print(__doc__)
        return 0 if overrides in (["--help"], ["-h"]) else 2
    try:
        run(overrides)
    except UserError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
