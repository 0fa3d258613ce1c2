"""The bench runs, and what it writes can be read; how fast anything is depends on the machine."""

import json
import math
import time

import bench
import jax
import numpy as np
import pytest

from fpo_jax.envs import aloha
from fpo_jax.envs.aloha_mujoco import simulate
from opengl import opengl_pool
from tiny import jit

TINY_TRAIN = [
    *("--train.env", "point_mass", "--train.num-envs", "4", "--train.rollout.decisions", "2"),
    *("--train.update.epochs", "1", "--train.update.minibatch-size", "4", "--train.actor.hidden", "8"),
    *("--train.critic.hidden", "8", "--train.actor.sampler-steps", "1", "--train.critic.value-samples", "1"),
]
TINY = ["--num-envs", "3", "--gym-envs", "2", "--max-steps", "4", "--repeats", "2", *TINY_TRAIN]
CIRCUMSTANCES = {"date", "machine", "device", "load_average", "git_revision", "python", "versions"}


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", jit)
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(records of a tiny bench, its result file)."""
    out = tmp_path_factory.mktemp("benchmarks")
    assert bench.main([*TINY, "--out", str(out)]) == 0
    (path,) = out.iterdir()
    return [json.loads(line) for line in path.read_text().splitlines()], path


def of_kind(records, kind):
    return [record for record in records if record["measurement"] == kind]


def test_every_line_says_what_when_and_with_what(written):
    records, path = written
    for record in records:
        assert record.keys() > CIRCUMSTANCES | {"measurement"}
        assert record["machine"] == path.stem and {"jax", "mujoco", "gym-aloha"} <= record["versions"].keys()
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))


def test_backends_and_ratios(written):
    records, _ = written
    steps = of_kind(records, "env_steps")
    assert [r["contender"] for r in steps] == [bench.RAW, bench.OURS, bench.GYM, bench.GYM_STATE]
    assert [r["num_envs"] for r in steps] == [3, 3, 2, 2]
    assert steps[0]["threads"] == steps[1]["threads"]
    assert all(r["env_steps_per_cpu_second"] > 0 and r["env_steps_per_second"] > 0 for r in steps)
    ratios = of_kind(records, "ratio")
    assert [(r["contender"], r["to"], r["target"]) for r in ratios] == [
        (bench.OURS, bench.RAW, 0.75),
        (bench.OURS, bench.GYM, 1.5),
        (bench.OURS, bench.GYM_STATE, None),
    ]
    assert all(0 < r["lowest"] <= r["ratio"] <= r["highest"] < math.inf for r in ratios)


def test_pictures_are_compared_with_pictures():
    def contender(name):
        return bench.Contender(name, 1, 1, lambda: 1)

    official, fast = bench.OURS_PIXELS.values()
    rates = {bench.OURS: 8.0, bench.RAW: 4.0, bench.GYM_PIXELS: 0.5, official: 2.0, fast: 3.0, "fpo_jax mjx": 1.0}
    rounds = {contender(name): [(rate, 10 * rate), (rate, 20 * rate)] for name, rate in rates.items()}
    found = {(r["contender"], r["to"]): (r["per"], r["ratio"], r["target"]) for r in bench.ratios(rounds)}
    assert found == {
        (bench.OURS, bench.RAW): ("CPU second", 2.0, 0.75),
        (official, bench.GYM_PIXELS): ("CPU second", 4.0, 50.0),
        (fast, bench.GYM_PIXELS): ("CPU second", 6.0, None),
        ("fpo_jax mjx", bench.OURS): ("second", 0.125, None),
    }


def test_the_cpu_time_of_pictures_counts():
    opengl_pool()
    contender = bench.pixel_env("fast", bench.workload(4), num_envs=3, threads=1)

    def of_other_processes():
        return contender.cpu_seconds() - time.process_time()

    assert contender.play() == 12  # starts and warms up
    first = of_other_processes()
    steps, with_rendering, _ = bench.timed(contender.play, contender.cpu_seconds)
    assert steps == 12
    assert first > 0 and with_rendering > of_other_processes() - first > 0


def test_an_iteration_is_taken_apart(written):
    records, _ = written
    phases = of_kind(records, "phase")
    assert [r["phase"] for r in phases] == ["encode", "act", "decode", "physics", "update", "train_iteration"]
    assert all(r["seconds"] > 0 and r["cpu_seconds"] > 0 for r in phases)
    (compilation,) = of_kind(records, "compilation")
    assert compilation["retraces"] == 0
    (memory,) = of_kind(records, "memory")
    assert 1e8 < memory["peak_host_bytes"] < 1e12


def test_lines_are_appended(written, tmp_path):
    path = tmp_path / "here.jsonl"
    path.write_text('{"measurement": "earlier"}\n')
    assert bench.main([*TINY, "--no-phases", "--machine", "here", "--repeats", "1", "--out", str(tmp_path)]) == 0
    kinds = [json.loads(line)["measurement"] for line in path.read_text().splitlines()]
    assert kinds == ["earlier"] + ["env_steps"] * 4 + ["ratio"] * 3


def test_all_play_the_same_steps_and_nobody_succeeds_in_them():
    work = bench.workload(20)
    assert work.actions.shape == (16, 20, 14) and work.chunk == 20
    for contender in (bench.raw_loop(work, 3, 2), bench.gym_vector(bench.GYM_STATE, work, 3)):
        assert contender.play() == 3 * 20
    whole = bench.workload(300)
    steps = whole.actions.shape[1]
    assert steps % whole.chunk == 0 and steps >= 150
    _, reward = simulate(whole.cube_position[0], whole.actions[0])
    assert len(reward) == steps and set(reward) >= {0, 2} and not np.any(reward == aloha.SUCCESS_REWARD)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--pixel-envs", "0"], "--pixel-envs must be at least 1"),
        (["--batch-sizes", "8", "0"], "--batch-sizes must be at least 1"),
        (["--train.env", "point_mas"], "did you mean 'point_mass'"),
    ],
)
def test_mistakes_are_one_sentence(options, sentence, tmp_path, capsys):
    assert bench.main([*TINY, "--out", str(tmp_path), *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
