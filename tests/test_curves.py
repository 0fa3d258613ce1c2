"""The script that draws runs: trains one or reads several."""

import json
import shutil
import subprocess
import sys

import curves as curves_script
import pytest
import train as train_script

from libero_venv import installed
from test_cli import POINT_MASS
from tiny_pi0 import LIBERO, write_checkpoint

PNG = b"\x89PNG\r\n\x1a\n"


def run(arguments, capsys) -> tuple[int, str, str]:
    code = curves_script.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "s0"
    assert train_script.main([*POINT_MASS, "--run-dir", str(folder), "--iterations", "3"]) == 0
    return folder


@pytest.fixture
def other_seed(run_dir, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "s1")
    config = json.loads((folder / "config.json").read_text()) | {"seed": 1, "run_dir": str(folder)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_it_trains_and_draws(tmp_path, capsys):
    arguments = [*POINT_MASS, "--run-dir", tmp_path / "run", "--iterations", "2", "--evaluation.episodes", "0"]
    code, out, err = run(arguments, capsys)
    assert code == 0, err
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(PNG) and "Curves: " in out


def test_it_reads_several_seeds(run_dir, other_seed, tmp_path, capsys):
    code, _, err = run(["--runs", run_dir, other_seed, "--out", tmp_path / "figures" / "two.svg"], capsys)
    assert code == 0, err
    text = (tmp_path / "figures" / "two.svg").read_text()
    base = json.loads((run_dir / "evaluation.json").read_text())["base"]
    assert "point_mass, preset default, seeds 0, 1" in text and "mean of 2 seeds" in text
    assert f"base policy ({base['success_rate']:.3g})" in text


def test_runs_that_are_no_seeds_of_each_other_are_refused(run_dir, other_seed, capsys):
    config = json.loads((other_seed / "config.json").read_text())
    other = {"num_envs": 16, "libero": config["libero"] | {"tasks": "spread", "egl_devices": [1]}}
    (other_seed / "config.json").write_text(json.dumps(config | other))
    code, _, err = run(["--runs", run_dir, other_seed], capsys)
    assert code == 2 and "is no other seed of" in err
    assert "num_envs: 8 -> 16; libero.tasks: uniform -> spread. Draw" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to draw"),
        (["--runs", "somewhere"], "somewhere holds no run"),
        (["--runs", "somewhere", "--env", "point_mass"], "--env is none of this script's options"),
        (["--runs", "somewhere", "--out", "curve.gif"], "let its name end in .png"),
        (["--runs", "somewhere", "--frames", "1"], "--frames must be at least 2"),
    ],
)
def test_a_wrong_word_is_one_sentence(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(arguments, capsys)
    assert code == 2 and said in err and err.count("\n") == 1


def test_an_environment_without_pictures_has_no_film(run_dir, tmp_path, capsys):
    arguments = ["--runs", run_dir, "--out", tmp_path / "curves.png", "--film", "--search", "4"]
    code, out, err = run(arguments, capsys)
    assert code == 2 and "point_mass has no renderer" in err and "Looking for an initial state" in out


@pytest.mark.libero
def test_a_libero_run_is_drawn_and_filmed(tmp_path):
    """The mechanics on a libero_10 task: a π0 of random weights, two cameras, a few steps."""
    installed()
    base = write_checkpoint(tmp_path / "micro", LIBERO)
    arguments = ["--env", "libero_10/0", "--base", base, *POINT_MASS[2:], "--num-envs", "2", "--rollout.decisions", "2"]
    arguments += ["--episode-length", "4", "--execute-steps", "2", "--openpi.denoise-steps", "2", "--iterations", "2"]
    arguments += ["--evaluation.episodes", "0", "--run-dir", tmp_path / "run", "--out", tmp_path / "curves.svg"]
    arguments += ["--film", "--episode", "1", "--search", "1", "--frames", "2"]
    command = [sys.executable, curves_script.__file__, *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)  # its simulators end with it
    assert done.returncode == 0, done.stderr
    assert "Episode 1: the base fails it, the tuned policy fails it." in done.stdout
    assert "libero_10/0, base micro" in (tmp_path / "curves.svg").read_text()
    film = (tmp_path / "curves_film.svg").read_text()
    assert "libero_10/0, evaluation episode 1" in film and film.count("step 4: failure") == 2
