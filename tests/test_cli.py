"""The command line: what a user types, what comes back, and what a wrong word says."""

import json
import shutil
import signal
import threading
from collections import namedtuple
from pathlib import Path

import evaluate as evaluate_script
import numpy as np
import pytest
import train as train_script

from fpo_jax import checkpoint, signals
from fpo_jax.evaluate import Evaluator
from fpo_jax.policies import CHECKPOINTS
from fpo_jax.types import FpoError

TINY = [
    *("--num-envs", "8", "--rollout.decisions", "3", "--update.epochs", "1", "--update.minibatch-size", "16"),
    *("--actor.hidden", "8", "--critic.hidden", "8", "--actor.sampler-steps", "2", "--critic.value-samples", "2"),
    *("--saving.every", "1", "--evaluation.episodes", "8", "--evaluation.no-video", "--saving.no-tensorboard"),
]
POINT_MASS = ["--env", "point_mass", *TINY]
ALOHA = ["--env", "aloha_transfer_cube", "--episode-length", "20", "--execute-steps", "10", *TINY]


def run(arguments, capsys) -> tuple[int, str, str]:
    code = train_script.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def state_files(run_dir: Path) -> dict:
    """Every saved array of the newest checkpoint, by name."""
    step = checkpoint.latest_step(run_dir)
    manifest = json.loads((run_dir / "checkpoints" / str(step) / "manifest.json").read_text())
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        arrays = reader.restore((run_dir / "checkpoints" / str(step) / "state").resolve())
    assert len(arrays) > 30 and set(arrays) <= set(manifest["arrays"])
    return {name: np.asarray(value) for name, value in arrays.items()}


def metrics(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("_seconds")} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    a, b = state_files(one), state_files(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert metrics(one) == metrics(other)


@pytest.mark.parametrize("options", [POINT_MASS, ALOHA], ids=["point_mass", "aloha"])
def test_two_and_two_more_iterations_are_four(options, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run([*options, "--iterations", 4, "--run-dir", whole], capsys)[0] == 0
    options = [*options, "--evaluation.episodes", 0]  # one evaluation is enough
    assert run([*options, "--iterations", 2, "--run-dir", parts], capsys)[0] == 0
    code, out, err = run(["--resume", "--run-dir", parts, "--iterations", 4], capsys)
    assert code == 0, err
    assert "resuming after iteration 2" in out
    assert_same_run(whole, parts)


def test_a_run_leaves_what_the_readme_promises(tmp_path, capsys):
    code, out, _ = run([*POINT_MASS, "--iterations", 3, "--run-dir", tmp_path / "r", "--saving.tensorboard"], capsys)
    assert code == 0
    for name in ("config.json", "provenance.json", "metrics.jsonl", "evaluation.json", "learning_curve.png"):
        assert (tmp_path / "r" / name).stat().st_size > 0
    assert list((tmp_path / "r" / "tensorboard").glob("events*"))
    assert {"iteration", "episodes", "env_steps", "success_rate", "return"} <= set(metrics(tmp_path / "r")[0])
    assert checkpoint.steps(tmp_path / "r", "milestones")[0] == 0
    latents = checkpoint.load_extra(tmp_path / "r", 0)
    assert latents["latent"].shape == (3, 8, 4)
    assert "tuned -    base: " in out
    target = tmp_path / "e.json"
    assert evaluate_script.main(["--run-dir", str(tmp_path / "r"), "--episodes", "10", "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    for policy in ("base", "tuned"):
        assert result[policy]["episodes"] == 10
        assert result[policy]["low"] <= result[policy]["success_rate"] <= result[policy]["high"]
    difference = result["tuned"]["success_rate"] - result["base"]["success_rate"]
    assert result["difference"]["success_rate"] == pytest.approx(difference)


def test_an_evaluation_that_was_cut_short_goes_on(tmp_path, capsys, monkeypatch):
    played, play, left = [], Evaluator.play_from, threading.Event()

    def play_from(*given):
        if len(played) == 3 and not left.is_set():  # in the second batch of the tuned policy
            signal.raise_signal(signal.SIGINT)
            assert left.wait(120)
            raise FpoError("the process is gone")
        played.append(given)
        return play(*given)

    monkeypatch.setattr(signals, "_leave", lambda *_: left.set())
    monkeypatch.setattr(Evaluator, "play_from", play_from)
    run_dir = tmp_path / "r"
    log = run_dir / "evaluation.tuned.jsonl"
    options = [*POINT_MASS, "--evaluation.episodes", 16, "--iterations", 1, "--run-dir", run_dir]
    assert "the process is gone" in run(options, capsys)[2]
    assert len(log.read_text().splitlines()) == 9  # one says what is evaluated
    with log.open("a") as file:
        file.write('{"episode": 8, "succ')  # half a line
    assert run([*options, "--resume", "auto"], capsys)[0] == 0
    assert len(played) == 4 and len(log.read_text().splitlines()) == 17
    whole = json.loads((run_dir / "evaluation.json").read_text())
    target = tmp_path / "whole.json"
    seed = json.loads((run_dir / "config.json").read_text())["evaluation"]["seed"]
    again = ["--run-dir", str(run_dir), "--episodes", "16", "--seed", str(seed), "--json", str(target)]
    assert evaluate_script.main(again) == 0  # without a stop
    result = json.loads(target.read_text())
    assert all(result[name] == whole[name] for name in ("base", "tuned", "difference"))
    # Another agent plays anew, the base does not.
    played.clear()
    assert run(["--resume", "--run-dir", run_dir, "--iterations", 2], capsys)[0] == 0
    assert len(played) == 2 and len(log.read_text().splitlines()) == 17


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--env", "aloha_transfer_cub"], "did you mean 'aloha_transfer_cube'"),
        (["--preset", "papper"], "did you mean 'paper'"),
        (["--base", "aloha_transfer_cubes"], "did you mean 'aloha_transfer_cube'"),
        (["--base", "./nowhere"], "nowhere"),
        (["--env", "point_mass", "--base", "aloha_transfer_cube"], "14 action dimensions"),
        (["--env", "point_mass", "--physics", "warp"], "has no physics 'warp'"),
        (["--env", "point_mass", "--latent.rank", "9"], "latent.rank is 9; choose 1 to 4"),
        (["--env", "point_mass", "--num-envs", "0"], "num_envs must be at least 1"),
        (["--env", "point_mass", "--parallel.fsdp", "0"], "parallel.fsdp must be at least 1"),
        (["--env", "point_mass", "--parallel.devices", "-1"], "parallel.devices must be at least 1"),
        (["--resume", "--run-dir", "nowhere"], "holds no run"),
    ],
)
def test_wrong_words_get_one_helpful_sentence(arguments, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(arguments, capsys)
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "runs").exists()  # nothing half-begun is left


def test_a_damaged_base_is_named(tmp_path, capsys):
    broken = tmp_path / "base"
    shutil.copytree(CHECKPOINTS / "aloha_transfer_cube", broken)
    weights = broken / "params.msgpack"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, err = run(["--base", broken, "--run-dir", tmp_path / "r"], capsys)
    assert code == 2 and "damaged" in err and err.count("\n") == 1


def test_resume_refuses_any_other_change_and_keeps_the_run(tmp_path, capsys):
    run_dir = tmp_path / "r"
    assert run([*POINT_MASS, "--iterations", 1, "--run-dir", run_dir], capsys)[0] == 0
    before = metrics(run_dir)
    resume = ["--resume", "--run-dir", run_dir, "--iterations"]
    code, _, err = run([*resume, 2, "--actor.learning-rate", 0.5], capsys)
    assert code == 2 and "actor.learning_rate: 0.001 -> 0.5" in err
    code, _, err = run([*resume, 1], capsys)
    assert code == 2 and "larger --iterations" in err
    code, _, err = run([*POINT_MASS, "--iterations", 1, "--run-dir", run_dir], capsys)
    assert code == 2 and "already holds a run" in err
    assert metrics(run_dir) == before


def test_a_full_disk_is_one_sentence(tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    code, _, err = run([*POINT_MASS, "--iterations", 1, "--run-dir", tmp_path / "r"], capsys)
    assert code == 2 and "disk" in err and "Traceback" not in err


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        train_script.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--fpo.epsilon" in text and "--critic.num-critics" in text and "(default:" in text
