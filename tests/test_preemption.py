"""Runs that are killed or told to stop at any moment, and go on by the same command: the trajectory stays the same."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import train as train_script

from fpo_jax import checkpoint
from fpo_jax.signals import TRY_AGAIN
from test_cli import POINT_MASS, assert_same_run, metrics, run

TRAIN = Path(train_script.__file__)
OPTIONS = [*POINT_MASS, "--evaluation.episodes", "0", "--resume", "auto"]
CONSECUTIVE = 12  # iterations: more than any run writes between two of its checkpoints


class Job:
    """One command that is started again and again, as a cluster would; its programs are compiled once."""

    def __init__(self, arguments: list, folder: Path):
        self.run_dir, self.log = folder / "killed", folder / "log"
        self.command = [sys.executable, str(TRAIN), *map(str, arguments), "--run-dir", str(self.run_dir)]
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.env = {**os.environ, **cache, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}

    def lines(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def start(self, iterations: int) -> subprocess.Popen:
        """Returns when that many iterations have ended in the new process."""
        opening = re.compile(r"(?:resuming after iteration (\d+)|compiling the first iteration) \.\.\.")
        with self.log.open("w") as stream:
            process = subprocess.Popen(self.command, stdout=stream, stderr=stream, env=self.env)
        try:
            while process.poll() is None:
                found = opening.search(self.log.read_text())
                if found and self.lines() >= int(found[1] or 0) + iterations:
                    return process
                time.sleep(0.005)
        except BaseException:  # the time limit of the test
            process.kill()
            raise
        raise AssertionError(f"it ended before {iterations} iterations: {self.log.read_text()}")

    def end(self, process: subprocess.Popen, number: signal.Signals) -> str:
        """How it ended: what was being done."""
        process.send_signal(number)
        code = process.wait(timeout=600)
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL
            return "while saving" if list(self.run_dir.rglob("*.partial")) else "between saves"
        assert code == TRY_AGAIN
        done = int(re.search(r"SIGTERM; the state after iteration (\d+) is saved", self.log.read_text())[1])
        assert checkpoint.latest_step(self.run_dir) == done == self.lines()
        return "told to stop"


def check_against_one_run(job: Job, whole: Path, capsys) -> None:
    """The job, ended where it is now, against a run that nobody disturbed."""
    iterations = job.lines() + 2
    options = [*OPTIONS, "--iterations", iterations, "--run-dir"]
    assert run([*options, job.run_dir], capsys)[0] == 0
    assert run([*options, whole], capsys)[0] == 0
    assert_same_run(whole, job.run_dir)
    for shelf in ("best", "milestones"):
        assert checkpoint.steps(job.run_dir, shelf) == checkpoint.steps(whole, shelf)
        assert checkpoint.latest_step(job.run_dir, shelf) == checkpoint.latest_step(whole, shelf)
    assert len(json.loads((job.run_dir / "provenance.json").read_text())["starts"]) > 2


def test_killed_twice_and_told_to_stop_once(tmp_path, capsys):
    job = Job([*OPTIONS, "--iterations", 10_000], tmp_path)
    job.end(job.start(3), signal.SIGKILL)
    (job.run_dir / "checkpoints" / ".999.partial").mkdir()  # what a machine that went down may leave
    job.end(job.start(4), signal.SIGTERM)
    job.end(job.start(5), signal.SIGKILL)
    check_against_one_run(job, tmp_path / "whole", capsys)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_kills_at_random_moments(tmp_path, capsys):
    """A quarter is SIGTERM, a few come before the first iteration; most of the rest hit a save."""
    draw, job, seen = random.Random(0), Job([*OPTIONS, "--iterations", 10_000], tmp_path), Counter()
    for _ in range(50):
        number = draw.choice([signal.SIGTERM, signal.SIGKILL, signal.SIGKILL, signal.SIGKILL])
        process = job.start(draw.randint(0, CONSECUTIVE) if number == signal.SIGKILL else 1)
        time.sleep(draw.uniform(0, 0.3))
        seen[job.end(process, number)] += 1
    with capsys.disabled():
        print(dict(seen), job.lines(), "iterations")
    assert seen["while saving"] >= 5 and seen["told to stop"] >= 5 and sum(seen.values()) == 50
    check_against_one_run(job, tmp_path / "whole", capsys)


def test_auto_begins_goes_on_and_ends(tmp_path, capsys):
    command = [*POINT_MASS, "--resume=auto", "--run-dir", tmp_path / "r", "--iterations"]
    code, out, err = run([*command, 1], capsys)
    assert code == 0 and "compiling the first iteration" in out, err
    assert "resuming after iteration 1" in run([*command, 2], capsys)[1]
    before = metrics(tmp_path / "r")
    code, out, _ = run([*command, 2], capsys)
    assert code == 0 and "nothing is left to do" in out and "tuned -    base: " in out
    code, _, err = run([*command, 2, "--seed", 3], capsys)
    assert code == 2 and "seed: 0 -> 3" in err
    (tmp_path / "r" / "stopped.json").write_text('{"iteration": 2, "reason": "success collapsed"}')
    code, _, err = run([*command, 3], capsys)
    assert code == 2 and "stopped itself: success collapsed" in err
    assert metrics(tmp_path / "r") == before


def test_runs_of_earlier_versions_resume(tmp_path, capsys):
    """They say `"resume": false`."""
    assert run([*POINT_MASS, "--iterations", 1, "--run-dir", tmp_path / "r"], capsys)[0] == 0
    saved = tmp_path / "r" / "config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"resume": False}))
    code, out, err = run(["--run-dir", tmp_path / "r", "--iterations", 2, "--resume"], capsys)
    assert code == 0 and "resuming after iteration 1" in out, err
    shutil.rmtree(tmp_path / "r")
    code, _, err = run(["--resume", "yes", "--run-dir", tmp_path / "r"], capsys)
    assert code == 2 and "holds no run" in err
