"""Kill a training run at random moments and see that it always goes on, to the same end.

    python scripts/kill_test.py --kills 20

Every start of the command is left alone for a random time, then the driver, the workers or both get SIGKILL; a
checkpoint is written every other step, so saves are hit too. Afterwards the run is finished and compared with an
undisturbed one: all losses and all weights must be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from signal import SIGKILL

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

JOB = [
    "model=tiny", "model.hidden=64", "model.layers=2", "model.positions=64", "model.dropout=0.1",
    "model.attention_dropout=0.1", "trainer.global_batch_size=8", "trainer.save_every=2", "trainer.eval_every=25",
    "trainer.eval_batches=2", "cluster.device=cpu",
]  # fmt: skip


def command(run_dir: Path, steps: int, *more: str) -> list[str]:
    """The training command."""
    return [sys.executable, "-m", "gpt.main", *JOB, f"trainer.max_steps={steps}", f"hydra.run.dir={run_dir}", *more]


def workers_of(run_dir: Path) -> list[int]:
    """Processes of the run's workers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
            alive = path.with_name("stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            continue
        if alive and b"gpt.worker" in words and str(run_dir).encode() in words:
            found.append(int(path.parent.name))
    return found


def main() -> None:
    """Run, kill, resume, compare; exit code 1 if the ends differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill-test-"))
    rng = random.Random(arguments.seed)

    calm, harried = folder / "calm", folder / "harried"
    subprocess.run(
        command(calm, arguments.steps, "trainer.save_every=0"), check=True, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    kills = _harry(harried, arguments, rng)
    subprocess.run(command(harried, arguments.steps), check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    print(f"{kills} kills; {_compare(calm, harried)}")


def _harry(run_dir: Path, arguments: argparse.Namespace, rng: random.Random) -> int:
    """Start and kill until it has been killed often enough; returns how often."""
    former: set[int] = set()
    for kill in range(1, arguments.kills + 1):
        process = subprocess.Popen(
            command(run_dir, arguments.steps), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while set(workers_of(run_dir)) <= former and process.poll() is None:
            time.sleep(0.02)
        moment, victims = rng.uniform(0.0, 5.0), rng.choice(["driver", "workers", "both"])
        time.sleep(moment)
        if process.poll() is not None:
            print(f"the run was over before kill {kill}; give it more --steps")
            return kill - 1
        if victims != "workers":
            process.kill()
        former = set(workers_of(run_dir))
        while victims != "driver" and (process.poll() is None or workers_of(run_dir)):
            for worker in workers_of(run_dir):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, SIGKILL)
            time.sleep(0.02)
        process.wait()
        print(f"kill {kill:>2}: {victims:<7} {moment:4.1f} s after the worker began; {_state(run_dir)}", flush=True)
    return int(arguments.kills)


def _state(run_dir: Path) -> str:
    names = sorted(p.name for p in (run_dir / "checkpoints").glob("*")) if (run_dir / "checkpoints").is_dir() else []
    unfinished = " and an unfinished save" if any(n.startswith(".tmp-") for n in names) else ""
    return f"newest checkpoint {([n for n in names if n.startswith('step_')] or ['none'])[-1]}{unfinished}"


def _compare(one: Path, other: Path) -> str:
    from gpt.runs.checkpoint.checkpoint import latest_valid

    results = [json.loads((path / "result.json").read_text()) for path in (one, other)]
    records = []
    for path in (one, other):
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        records.append([(r["step"], r["train/loss"], r.get("val/loss")) for r in rows])
    ends = [latest_valid(path, lambda line: None) for path in (one, other)]
    assert ends[0]
    assert ends[1]
    weights = [end.model() for end in ends if end]
    same = records[0] == records[1] and all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    if not same:
        raise SystemExit(f"the ends differ: {results[0]} and {results[1]}")
    loss = results[0]["train/loss"]
    return f"{len(records[0])} losses and {len(weights[0])} weights are bit for bit the same; final loss {loss:.6f}"


if __name__ == "__main__":
    main()
