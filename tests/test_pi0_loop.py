"""The whole loop with a π0 base on camera images: train, resume, evaluate, look at steerability."""

import json
import shutil
from dataclasses import dataclass, replace

import evaluate as evaluate_script
import jax
import numpy as np
import pytest
import steerability as steerability_script
import train as train_script

from fpo_jax import runs
from fpo_jax.config import TrainConfig
from fpo_jax.policies.openpi import OpenpiPolicy
from fpo_jax.rollout import FrozenBase
from fpo_jax.runs import build, load_run
from fpo_jax.types import Camera
from opengl import opengl_pool
from test_cli import assert_same_run, metrics
from tiny import begin, init_fpo, keys, run_rollout
from tiny_pi0 import write_checkpoint

TINY = [
    *("--env", "aloha_transfer_cube", "--render", "fast", "--episode-length", "20", "--execute-steps", "10"),
    *("--num-envs", "4", "--rollout.decisions", "3", "--update.epochs", "1", "--update.minibatch-size", "16"),
    *("--actor.hidden", "8", "--critic.hidden", "8", "--actor.sampler-steps", "2", "--critic.value-samples", "2"),
    *("--saving.every", "1", "--evaluation.episodes", "4", "--evaluation.no-video", "--saving.no-tensorboard"),
    *("--openpi.denoise-steps", "2"),
]


@pytest.fixture(scope="module", autouse=True)
def opengl():
    """Pictures are drawn here."""
    opengl_pool()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base") / "micro")


@pytest.fixture(scope="module")
def run_dir(base, tmp_path_factory):
    """Two iterations without a break."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train_script.main([*TINY, "--base", str(base), "--run-dir", str(folder), "--iterations", "2"]) == 0
    return folder


def test_it_trains_and_evaluates(run_dir):
    assert [line["iteration"] for line in metrics(run_dir)] == [1, 2]
    assert all(np.isfinite(line["critic_loss"]) for line in metrics(run_dir))
    assert json.loads((run_dir / "evaluation.json").read_text())["base"]["episodes"] == 4


def test_one_and_one_are_two(run_dir, base, tmp_path):
    """A resumed run is bitwise the uninterrupted one: images and feature statistics are part of the state."""
    arguments = [*TINY, "--base", str(base), "--run-dir", str(tmp_path / "run")]
    assert train_script.main([*arguments, "--iterations", "1"]) == 0
    assert train_script.main([*arguments, "--iterations", "2", "--resume"]) == 0
    assert_same_run(run_dir, tmp_path / "run")


def test_the_base_may_move(run_dir, base, tmp_path, capsys):
    """Weights elsewhere are found again, by resume and by evaluation; other weights are refused."""
    arguments = [*TINY, "--base", str(base / "openpi.json"), "--run-dir", str(tmp_path / "run")]
    old, new, wrong = tmp_path / "old", tmp_path / "new", tmp_path / "wrong"
    shutil.copytree(base, old)
    begin_here = [*arguments, "--checkpoint", str(old), "--iterations", "1", "--evaluation.episodes", "0"]
    assert train_script.main(begin_here) == 0
    old.rename(new)
    capsys.readouterr()
    assert evaluate_script.main(["--run-dir", str(tmp_path / "run"), "--episodes", "2"]) == 2
    assert "There is no checkpoint at" in capsys.readouterr().err
    found = ["--run-dir", str(tmp_path / "run"), "--episodes", "2", "--checkpoint", str(new)]
    assert evaluate_script.evaluate(evaluate_script.parse(found))["tuned"]["episodes"] == 2
    write_checkpoint(wrong, seed=1)
    resume = [*arguments, "--iterations", "2", "--resume", "--evaluation.episodes", "0", "--checkpoint"]
    assert train_script.main([*resume, str(wrong)]) == 2
    assert "The base policy is not the one" in capsys.readouterr().err
    assert train_script.main([*resume, str(new)]) == 0


def test_a_finished_run_is_evaluated_again(run_dir, tmp_path, capsys):
    args = evaluate_script.parse(["--run-dir", str(run_dir), "--episodes", "4", "--seed", "7"])
    result = evaluate_script.evaluate(args)
    assert result["base"]["episodes"] == result["tuned"]["episodes"] == 4
    assert result["base"]["episode_length"] == 20  # these weights are random: nobody succeeds


def test_steerability_of_a_base_that_sees(base):
    settings = steerability_script.CrossEntropySettings(generations=1, population=2, elites=1, episodes_per_candidate=2)
    args = steerability_script.Args(
        base=str(base), states=2, noises=2, search=settings, render="fast", episode_length=10, execute_steps=10
    )
    figures, rates = steerability_script.measure(args)
    assert rates.shape == (2,) and figures["latent"] == "dct, D = 28"  # 2 x 14 of 2 x 16


@dataclass(frozen=True)
class CountedPolicy(OpenpiPolicy):
    """Counts how often the prefix really runs."""

    def encode(self, params, observation):
        jax.debug.callback(lambda: _calls.append(1))
        return super().encode(params, observation)


_calls: list[int] = []


def test_the_prefix_runs_once_per_decision(base):
    """And once more for the value of a rollout's last observation."""
    config = TrainConfig(base=str(base), num_envs=2, execute_steps=5, episode_length=20, render="fast")
    system, params = build(replace(config, openpi=replace(config.openpi, denoise_steps=2)))
    policy = system.base
    counted = CountedPolicy(policy.config, policy.cameras, policy.prompt, policy.tokenizer, denoise_steps=2)
    system = replace(system, base=counted)
    agent = init_fpo(config, system.dims, jax.random.key(0))
    carry = begin(system, keys(2))
    for decisions in (1, 3):
        _calls.clear()
        jax.block_until_ready(run_rollout(system, FrozenBase(params), agent, carry, jax.random.key(1), decisions))
        jax.effects_barrier()
        assert len(_calls) == decisions + 1


def test_the_statistics_come_from_the_checkpoint(run_dir):
    _, system, frozen, state = load_run(run_dir)
    assert frozen.features is state.features
    assert state.features.mean.shape == (system.base.feature_dim,)
    assert float(np.abs(state.features.mean).max()) > 0


@pytest.mark.parametrize(("asked", "drawn"), [(None, "fast"), ("official", "official")])
def test_pictures_are_those_the_base_was_trained_on(asked, drawn, monkeypatch):
    """Unless others are asked for."""
    wanted, make_env = [], runs.make_env
    monkeypatch.setattr(runs, "make_env", lambda *args: wanted.append(args[4]) or make_env(*args))
    build(TrainConfig(base="pi0_tiny", num_envs=2, render=asked))
    assert wanted == [(Camera("top", 56, drawn),)]
