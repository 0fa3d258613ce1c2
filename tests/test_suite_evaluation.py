"""experiments/evaluate.py on whole suites, of a base alone and of a run; and a command that is killed and repeated."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import evaluate as script
import pytest
import train as train_script

from fpo_jax import runs
from fpo_jax.envs import make_env, workers
from fpo_jax.metrics import wilson_interval
from test_evaluate import count_batches
from test_libero import SPATIAL_TASKS
from tiny_libero import NoisyBase, log_of, use_fake_workers

SHORT = ["--episode-length", "12", "--execute-steps", "3", "--num-envs", "4"]
SUITE = ["--env", "libero_spatial", *SHORT]
TINY_RUN = [
    *("--rollout.decisions", "3", "--update.epochs", "1", "--update.minibatch-size", "16"),
    *("--actor.hidden", "8", "--critic.hidden", "8", "--actor.sampler-steps", "2", "--critic.value-samples", "2"),
    *("--evaluation.episodes", "0", "--saving.no-tensorboard", "--saving.every", "1", "--libero.train-inits", "0:9"),
]


@pytest.fixture(autouse=True)
def fake_workers(monkeypatch):
    """LIBERO with fake workers, and a base that needs no file."""
    made = []

    def make(*args):
        made.append(make_env(*args))
        return made[-1]

    use_fake_workers(monkeypatch)
    monkeypatch.setattr(runs, "make_env", make)
    monkeypatch.setattr(runs, "open_base", lambda *args, **kwargs: (NoisyBase(), dict))
    yield
    for env in made:
        env.close()


def run(arguments, capsys) -> tuple[int, str, str]:
    code = script.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_base_on_a_whole_suite(tmp_path, capsys):
    """All official episodes by default, per task and together."""
    target = tmp_path / "new" / "spatial.json"
    code, out, _ = run([*SUITE, "--json", target, "--openpi.prompt", "do it"], capsys)
    assert code == 0
    result = json.loads(target.read_text())
    assert result.keys() == {"base", "protocol", "evaluation"} and result["protocol"]["prompt"] == "do it"
    base = result["base"]
    assert base["episodes"] == result["evaluation"]["episodes"] == 150 and base["tasks"].keys() == set(SPATIAL_TASKS)
    successes = [round(task["success_rate"] * 50) for task in base["tasks"].values()]
    assert [task["episodes"] for task in base["tasks"].values()] == [50] * 3 and 0 < sum(successes) < 150
    assert (base["success_rate"], base["low"], base["high"]) == tuple(wilson_interval(sum(successes), 150))
    deviations = result["protocol"]["deviations"]
    assert deviations.keys() == {"seeds", "episode_length", "execute_steps", "observation", "prompt"}
    assert deviations["prompt"] == "'do it' instead of the task's name"
    for sentence in ("reach_the_red_goal: base ", "base: success ", "execute_steps: 3 instead of 5", "so far"):
        assert sentence in out


def test_a_repeated_command_plays_nothing_twice(tmp_path, capsys, monkeypatch):
    command = [*SUITE, "--libero.test-inits", "0:4", "--json"]
    assert run([*command, tmp_path / "whole.json"], capsys)[0] == 0
    target = tmp_path / "parts.json"
    with monkeypatch.context() as patch:
        count_batches(patch, stop_before=2)
        code, _, err = run([*command, target], capsys)
    assert code == 130 and "the same command goes on" in err and not target.exists()
    played = count_batches(monkeypatch)
    for _ in range(2):
        assert run([*command, target], capsys)[0] == 0
        assert len(played) == 1  # of three batches
        assert json.loads(target.read_text()) == json.loads((tmp_path / "whole.json").read_text())
    code, _, err = run([*command[:-1], "--seed", 1, "--json", target], capsys)
    assert code == 2 and "another evaluation (seed: 2000003 -> 1): choose another --json" in err
    code, _, err = run([*SUITE, "--libero.test-inits", "4:8", "--json", target], capsys)
    assert code == 2 and "protocol.test_inits: 0:4 -> 4:8" in err


def test_broken_episodes_are_kept_apart(tmp_path, capsys, monkeypatch):
    """Also when they come from the file."""
    (tmp_path / "log").mkdir()
    use_fake_workers(monkeypatch, faults={"step:die": 0.1}, log=str(tmp_path / "log"))
    command = [*SUITE, "--libero.test-inits", "0:8", "--json", tmp_path / "r.json"]
    assert run(command, capsys)[0] == 0
    broken = [entry["episode"][1] for entry in log_of(tmp_path / "log") if "broke" in entry]
    assert len(broken) > 1
    first = (tmp_path / "r.json").read_text()
    base = json.loads(first)["base"]
    assert (base["episodes"], base["invalid_episodes"]) == (24 - len(broken), len(broken))
    for index, name in enumerate(SPATIAL_TASKS):
        assert base["tasks"][name]["invalid_episodes"] == broken.count(index)
    code, out, _ = run(command, capsys)
    assert code == 0 and (tmp_path / "r.json").read_text() == first
    assert f"({len(broken)} invalid, not counted)" in out


def test_a_run_on_a_suite(tmp_path, capsys, monkeypatch):
    """Base and tuned on the same initial states; another step of the run does not need its base again."""
    folder, target = tmp_path / "run", tmp_path / "run.json"
    assert train_script.main([*SUITE, *TINY_RUN, "--run-dir", str(folder), "--iterations", "2"]) == 0
    command = ["--run-dir", folder, "--libero.test-inits", "0:4", "--json", target]
    with monkeypatch.context() as patch:
        count_batches(patch, stop_before=4)
        assert run(command, capsys)[0] == 130
    played = count_batches(monkeypatch)
    code, out, _ = run(command, capsys)
    assert code == 0 and len(played) == 2 and "tuned -    base: " in out
    result = json.loads(target.read_text())
    for policy in ("base", "tuned"):
        assert result[policy]["episodes"] == 12 and len(result[policy]["tasks"]) == 3
    difference = result["tuned"]["success_rate"] - result["base"]["success_rate"]
    assert result["difference"]["success_rate"] == pytest.approx(difference)
    assert (result["run"]["iteration"], result["protocol"]["train_inits"]) == (2, "0:9")
    assert result["protocol"]["deviations"]["train_inits"] == "0:9, some of which are evaluated"
    shutil.rmtree(folder / "checkpoints" / "2")
    code, _, err = run(command, capsys)
    assert code == 2 and "run.tuned.jsonl holds episodes of another evaluation (agent_crc32: " in err
    (tmp_path / "run.tuned.jsonl").unlink()
    played.clear()
    assert run(command, capsys)[0] == 0
    assert len(played) == 3 and json.loads(target.read_text())["run"]["iteration"] == 1
    code, _, err = run(["--run-dir", folder, "--execute-steps", "5", "--env", "libero_goal"], capsys)
    assert code == 2 and "changed here: env: libero_spatial -> libero_goal; execute_steps: 3 -> 5" in err
    code, _, err = run(["--run-dir", folder, "--libero.train-inits", "sampled"], capsys)
    assert code == 2 and "changed here: libero.train_inits: 0:9 -> sampled" in err


def test_a_run_is_evaluated_where_its_own_environments_would_not_fit(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    assert train_script.main([*SUITE, *TINY_RUN, "--run-dir", str(folder), "--iterations", "1"]) == 0
    monkeypatch.setattr(workers, "available_memory", lambda: 600 * 2**20)
    command = ["--run-dir", folder, "--libero.test-inits", "0:2"]
    code, _, err = run(command, capsys)
    assert code == 2 and "4 simulators need about 1 GiB" in err and "choose --num-envs 3 or fewer" in err
    assert run([*command, "--num-envs", 2], capsys)[0] == 0
    assert train_script.main(["--resume", "--run-dir", str(folder), "--iterations", "2"]) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give a run by --run-dir, or a base by --env and --base"),
        (["--env", "libero_spatal"], "did you mean 'libero_spatial'"),
        ([*SUITE, "--floors"], "need a tuned policy"),
        ([*SUITE, "--num-envs", "0"], "--num-envs must be at least 1"),
        (["--run-dir", "nowhere"], "holds no run"),
    ],
)
def test_mistakes_are_named(arguments, sentence, capsys):
    code, _, err = run(arguments, capsys)
    assert code == 2 and sentence in err and err.startswith("Error: ")


# The command, but for an evaluation that never ends: its last episodes wait to be killed.
ENDLESS = """
import sys, time, evaluate
from fpo_jax.evaluate import Evaluator
play, batches = Evaluator.play_from, []

def play_from(*args):
    batches.append(args)
    if len(batches) == 60:
        time.sleep(10_000)
    return play(*args)

Evaluator.play_from = play_from
sys.exit(evaluate.main(sys.argv[1:]))
"""


def test_killed_and_repeated(tmp_path, capsys, monkeypatch):
    """SIGKILL in the middle of a real process."""
    monkeypatch.undo()
    command = ["--env", "point_mass", "--episodes", "90", "--num-envs", "1", "--json"]
    target, log = tmp_path / "killed.json", tmp_path / "killed.base.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, *command, str(target)],
        stdout=subprocess.DEVNULL,
        cwd=Path(script.__file__).parent,
    )
    try:
        while not (log.exists() and log.read_bytes().count(b"\n") > 3):
            assert process.poll() is None
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = [line for line in log.read_text().splitlines()[1:] if line.endswith("}")]
    assert 2 < len(finished) < 60 and not target.exists()
    played = count_batches(monkeypatch)
    assert run([*command, target], capsys)[0] == 0
    assert len(played) == 90 - len(finished)
    assert run([*command, tmp_path / "whole.json"], capsys)[0] == 0
    assert json.loads(target.read_text()) == json.loads((tmp_path / "whole.json").read_text())
