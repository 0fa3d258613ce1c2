"""LIBERO's suites and protocol, on fake workers; and the whole loop on a suite: train, break, resume, evaluate."""

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax import fit as fit_module
from fpo_jax import parallel, runs
from fpo_jax.config import LiberoOptions, TrainConfig, check, from_dict, to_dict
from fpo_jax.envs import libero, make_env, resolve_physics
from fpo_jax.envs.host import HostEnv
from fpo_jax.evaluate import Evaluator, compare
from fpo_jax.fit import RunStopped, fit
from fpo_jax.metrics import read_jsonl
from fpo_jax.rollout import FrozenBase
from fpo_jax.runs import default_run_dir, load_run
from fpo_jax.types import Camera, FpoError
from test_parallel import TWO
from test_rollout import plain
from tiny import init_fpo, keys
from tiny_libero import FAKE, LIBERO, NoisyBase, fake_libero, fpo_system, log_of, pool_of, use_fake_workers

SPATIAL_TASKS = ("reach_the_red_goal", "reach_the_blue_goal", "reach_the_green_goal")


# --- the protocol


def test_official_protocol_is_the_default():
    limits = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
    assert limits == libero.EPISODE_LENGTH
    cameras = (Camera("image", 8), Camera("wrist_image", 8))
    with fake_libero(cameras=cameras, episode_length=None, execute_steps=None) as env:
        spec = env.spec
    assert (spec.episode_length, spec.execute_steps, spec.decisions, spec.control_hz) == (220, 5, 44, 20.0)
    assert (spec.action_dim, spec.proprio_dim, spec.tasks) == (7, 8, SPATIAL_TASKS)
    assert spec.prompts[0] == "reach the red goal" and spec.test_episodes == 150
    assert spec.protocol is not None and spec.protocol["deviations"] == {"seeds": "episode instead of openpi"}
    assert spec.protocol["versions"] == {"fake": "1"} and spec.protocol["wait_steps"] == 10
    json.dumps(spec.protocol)


def test_deviations_are_named():
    options = replace(FAKE, seeds="openpi", test_inits="40:50", train_inits="0:40")
    cameras = (Camera("image", 8, "fast"),)
    with fake_libero(options=options, cameras=cameras, episode_length=None, execute_steps=10) as env:
        assert env.spec.protocol["deviations"] == {
            "execute_steps": "10 instead of 5",
            "test_inits": "40:50 instead of all",
            "quality": "fast instead of official",
            "cameras": "image instead of image and wrist_image",
        }
        assert env.spec.protocol["train_inits"] == "0:40" and env.spec.test_episodes == 30
    with fake_libero() as env:
        assert env.spec.protocol["deviations"]["observation"] == "object poses instead of pictures"


@pytest.mark.parametrize("name", ["libero_90/1", "libero_90/KITCHEN_SCENE2_close_the_drawer"])
def test_one_task_of_a_suite(name, tmp_path):
    with fake_libero(name, told={"log": str(tmp_path)}) as env:
        assert env.spec.tasks == ("KITCHEN_SCENE2_close_the_drawer",) and env.spec.name == name
        state = env.reset(keys(3))
        assert not np.any(state.env_id)
    assert {tuple(e["episode"][:2]) for e in log_of(tmp_path) if e["op"] == "reset"} == {("libero_90", 1)}


def test_mistakes_are_named(monkeypatch):
    use_fake_workers(monkeypatch)
    with pytest.raises(FpoError, match="libero_90 has the tasks 0 to 1, so there is no libero_90/2"):
        libero.make_libero("libero_90/2")
    with pytest.raises(FpoError, match="did you mean 'KITCHEN_SCENE2_close_the_drawer'"):
        libero.make_libero("libero_90/KITCHEN_SCENE2_close_drawer")
    with pytest.raises(FpoError, match="did you mean 'libero_spatial'"):
        make_env("libero_spatal")
    with pytest.raises(FpoError, match="only LIBERO's suites have tasks"):
        resolve_physics("point_mass/3")
    with pytest.raises(FpoError, match="no camera 'top'"):
        libero.make_libero("libero_90", [Camera("top", 8)])
    with pytest.raises(FpoError, match="one size"):
        libero.make_libero("libero_90", [Camera("image", 8), Camera("wrist_image", 9)])
    for inits in ("50", "0:51", "3:3", "-1:4", "a:b"):
        with pytest.raises(FpoError, match=r"give all, or a part of the 50"):
            libero.make_libero("libero_90", options=replace(FAKE, test_inits=inits))
    with pytest.raises(FpoError, match=r"libero\.step_seconds must be greater than 0"):
        check(replace(LIBERO, libero=LiberoOptions(step_seconds=0.0)))
    assert resolve_physics("libero_90/3") == "mujoco"
    assert str(default_run_dir(replace(LIBERO, env="libero_90/3"))) == "runs/libero_90-3-default-s0"
    assert from_dict(json.loads(json.dumps(to_dict(LIBERO)))) == LIBERO


# --- several GPUs


def egl_device(pid: int) -> str | None:
    """What this worker was told."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    told = [text.partition("=")[2] for text in variables if text.startswith("MUJOCO_EGL_DEVICE_ID=")]
    return told[0] if told else None


def test_several_gpus_draw_in_turn():
    """A worker that replaces another one draws where that did; results do not tell which GPU drew."""
    cameras, told = (Camera("image", 8),), {"opengl": "egl"}
    with fake_libero(cameras=cameras, told=told) as env:
        env.reset(keys(2))
        assert {egl_device(pid) for pid in pool_of(env).pids().values()} == {None}
        protocol = env.spec.protocol
    options = replace(FAKE, egl_devices=(2, 5, 0))
    with fake_libero(cameras=cameras, told=told, options=options) as env:
        assert env.spec.protocol == protocol
        state = env.reset(keys(4))
        before = pool_of(env).pids()
        assert {slot: egl_device(pid) for slot, pid in before.items()} == {0: "2", 1: "5", 2: "0", 3: "2"}
        os.kill(before[1], signal.SIGKILL)
        assert env.step(state, jnp.zeros((4, 4, 7))).fault.tolist() == [False, True, False, False]
        after = pool_of(env).pids()
        assert after[1] != before[1] and egl_device(after[1]) == "5"


def test_gpus_that_cannot_draw_are_refused(monkeypatch):
    use_fake_workers(monkeypatch)
    options, cameras = replace(FAKE, egl_devices=(0, 1)), (Camera("image", 8),)
    with pytest.raises(FpoError, match=r"^--libero.egl-devices needs EGL, but fake draws here: mend that, or leave it"):
        libero.make_libero("libero_90", cameras, options)
    libero.make_libero("libero_90", options=options).close()  # draws nothing
    with pytest.raises(FpoError, match=r"^--libero.egl-devices are numbers from 0, not -1\.$"):
        libero.make_libero("libero_90", cameras, replace(options, egl_devices=(0, -1)))
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "1")
    with pytest.raises(FpoError, match=r"^--libero.egl-devices and the variable MUJOCO_EGL_DEVICE_ID .*: give one\.$"):
        libero.make_libero("libero_90", cameras, options)


def test_a_run_may_go_on_with_other_gpus():
    saved = runs.settled(LIBERO)
    runs.check_resumable(saved, replace(saved, libero=replace(saved.libero, egl_devices=(0, 1))))


# --- which episodes are played


def sampler(**changes) -> libero.LiberoSampler:
    return replace(libero.LiberoSampler((4, 7, 9), None, (0, 50)), **changes)


def test_training_draws_tasks_uniformly_and_initial_states_from_its_split():
    tally = jnp.zeros((3, 2))
    free = sampler().draw(keys(600), tally, jnp.arange(600))
    assert np.all(np.asarray(free.init) == -1) and not np.any(free.test)
    np.testing.assert_array_equal(free.task, np.array([4, 7, 9])[np.asarray(free.env_id)])
    assert all(150 < count < 250 for count in Counter(np.asarray(free.env_id).tolist()).values())
    assert len(np.unique(free.seed)) == 600
    part = sampler(train_inits=(10, 40)).draw(keys(600), tally, jnp.arange(600))
    assert set(np.asarray(part.init).tolist()) == set(range(10, 40))


@pytest.mark.parametrize("mesh", [None, TWO])
def test_tasks_can_be_spread_over_the_environments(mesh, tmp_path):
    """Each simulator then keeps its task from episode to episode; on several devices too."""
    options = replace(FAKE, tasks="spread")
    with fake_libero(options=options, told={"log": str(tmp_path)}) as env, parallel.using(mesh):
        begin = jax.jit(parallel.over_devices(env.reset, parallel.ENVS, parallel.ENVS))
        with pytest.raises(FpoError, match=r"2 environments are too few for 3 tasks: choose --num-envs 3 or more"):
            begin(keys(2))
        step = jax.jit(parallel.over_devices(env.step, (parallel.ENVS, parallel.ENVS), parallel.ENVS))
        state = begin(keys(8))
        for _ in range(9):  # two ends and what follows
            state = step(state, jnp.zeros((8, 4, 7)))
        np.testing.assert_array_equal(state.env_id, np.arange(8) % 3)
        np.testing.assert_array_equal(state.observation.task, state.env_id)
    logs = [[json.loads(line) for line in file.read_text().splitlines()] for file in tmp_path.iterdir()]
    played = [[entry["episode"] for entry in entries if entry["op"] == "reset"] for entries in logs]
    played = [episodes for episodes in played if episodes]  # by each process
    assert [len(episodes) for episodes in played] == [2] * 8
    assert sorted(episodes[0][1] for episodes in played) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert all(first[1] == second[1] and first[3] != second[3] for first, second in played)


def test_evaluation_plays_every_initial_state_of_every_task_once():
    numbers = jnp.arange(150)
    test = sampler().test(numbers, keys(150))
    assert np.all(test.test) and len(np.unique(test.seed)) == 150
    pairs = list(zip(np.asarray(test.task).tolist(), np.asarray(test.init).tolist(), strict=True))
    assert sorted(pairs) == [(task, init) for task in (4, 7, 9) for init in range(50)]
    assert pairs[:4] == [(4, 0), (7, 0), (9, 0), (4, 1)]  # so a part of them is fair to every task
    part = sampler(test_inits=(40, 50)).test(numbers, keys(150))
    assert Counter(np.asarray(part.init).tolist()) == dict.fromkeys(range(40, 50), 15)
    assert set(np.asarray(sampler(openpi_seeds=True).test(numbers, keys(150)).seed).tolist()) == {7}


def test_evaluation_is_paired_and_plays_no_episode_twice(tmp_path):
    options = replace(FAKE, test_inits="0:5", seeds="openpi")
    with fake_libero(options=options, told={"log": str(tmp_path)}) as env:
        config = replace(LIBERO, num_envs=4)
        system = fpo_system(env, config)
        evaluator = Evaluator(system, FrozenBase({}), episodes=15, seed=3)
        base = evaluator.play_base()
        agent = init_fpo(config, system.dims, jax.random.key(0))
        tuned = evaluator.play(agent)
        result = compare(base, tuned, env.spec)
    # 15 episodes in 4 batches of 4, twice; what ended did not begin again
    resets = [e for e in log_of(tmp_path) if e["op"] == "reset"]
    assert len(resets) == 2 * 16
    played = Counter((e["episode"][1], e["episode"][2], e["episode"][3]) for e in resets)
    assert set(played) == {(task, init, 7) for task in range(3) for init in range(5)}
    np.testing.assert_array_equal(base.env_id, np.arange(15) % 3)
    assert result["base"]["episodes"] == 15 and result["base"]["invalid_episodes"] == 0
    assert set(result["tuned"]["tasks"]) == set(SPATIAL_TASKS)
    assert sum(task["episodes"] for task in result["tuned"]["tasks"].values()) == 15
    assert result["protocol"] == env.spec.protocol
    # step 0 is the base: the same episodes, seen once more
    np.testing.assert_array_equal(base.success, tuned.success)


def test_evaluation_counts_what_broke_and_only_that(tmp_path):
    told = {"faults": {"die": 0.15}, "log": str(tmp_path)}
    with fake_libero(options=replace(FAKE, max_restarts=1000), told=told) as env:
        system = fpo_system(env, replace(LIBERO, num_envs=8))
        outcomes = Evaluator(system, FrozenBase({}), episodes=24, seed=3).play_base()
    broken = {str(e["episode"]) for e in log_of(tmp_path) if "broke" in e}
    assert outcomes.invalid.sum() == len(broken) > 4
    assert not np.any(outcomes.invalid & outcomes.success) and np.any(~outcomes.invalid)


def test_evaluation_stops_when_no_episode_can_begin():
    with fake_libero(options=replace(FAKE, max_restarts=2), told={"faults": {"die": 1.0}}) as env:
        system = fpo_system(env, replace(LIBERO, num_envs=4))
        with pytest.raises(FpoError, match=r"The evaluation stopped: .* were lost"):
            Evaluator(system, FrozenBase({}), episodes=4, seed=3).play_base()


# --- the whole loop


@pytest.fixture
def loop(monkeypatch, tmp_path):
    """`fit` on a suite with fake workers: its environments, and whether its base asks for feature statistics."""
    this = SimpleNamespace(envs=[], standardize=True)

    def build(config: TrainConfig):
        made = make_env(config.env, "mujoco", config.episode_length, config.execute_steps, (), config.libero)
        assert isinstance(made, HostEnv)
        this.envs.append(made)
        return fpo_system(made, config, NoisyBase(standardize=this.standardize)), {}

    for module in (runs, fit_module):
        monkeypatch.setattr(module, "build", build)
    use_fake_workers(monkeypatch)
    yield this
    for env in this.envs:
        env.close()


def loop_config(folder, **changes) -> TrainConfig:
    saving = replace(LIBERO.saving, tensorboard=False, every=1, milestone_every=0)
    evaluation = replace(LIBERO.evaluation, episodes=0, video=False)
    actor = replace(LIBERO.actor, hidden=(8,))
    config = replace(LIBERO, run_dir=str(folder), saving=saving, evaluation=evaluation, actor=actor)
    return replace(config, **changes)


def test_resume_is_exact_but_for_the_episodes_that_were_running(loop, tmp_path):
    config = loop_config(tmp_path / "run", iterations=1)
    fit(config)
    _, _, _, before = load_run(tmp_path / "run")
    start = json.loads((tmp_path / "run" / "provenance.json").read_text())["starts"][0]
    assert start["protocol"]["execute_steps"] == 3 and "episode_length" in start["protocol"]["deviations"]
    running = int(np.sum(~np.asarray(before.rollout.env.done)))
    assert running > 0
    loop.envs[0].close()
    fit(replace(config, iterations=2, resume="yes"))
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["invalid_episodes"] for line in lines] == [0, running]
    for line in lines:
        assert {name for name in line if "/" in name} == {f"success_rate/{task}" for task in SPATIAL_TASKS}
    known = [lines[0][f"success_rate/{task}"] for task in SPATIAL_TASKS]
    known = [rate for rate in known if rate is not None]  # of tasks that ended
    assert known and min(known) <= lines[0]["success_rate"] <= max(known)
    _, _, _, after = load_run(tmp_path / "run")
    # what was learned before and the books are there; no more was lost than what ran
    assert int(after.iteration) == 2
    jax.tree.map(
        lambda old, new: np.testing.assert_array_equal(old[1], new[0]), plain(before.window), plain(after.window)
    )


def test_too_many_faults_stop_a_run_with_its_state_saved(loop, tmp_path, monkeypatch):
    (tmp_path / "log").mkdir()
    use_fake_workers(monkeypatch, faults={"die": 0.3}, log=str(tmp_path / "log"))
    loop.standardize = False
    config = loop_config(tmp_path / "run", iterations=50, libero=replace(FAKE, max_restarts=5))
    with pytest.raises(RunStopped, match=r"\d simulator processes were lost .* is saved in .*--resume") as stopped:
        fit(config)
    assert stopped.value.exit_code == 2
    step = int(load_run(tmp_path / "run")[3].iteration)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["iteration"] == step + 1 and lines[-1]["worker_restarts"] >= 6
    broken = {str(entry["episode"]) for entry in log_of(tmp_path / "log") if "broke" in entry}
    assert sum(line["invalid_episodes"] for line in lines) == len(broken)  # also those that broke at the very start
    assert json.loads((tmp_path / "run" / "stopped.json").read_text())["iteration"] == step


def test_a_base_that_wants_two_cameras_gets_them(monkeypatch):
    use_fake_workers(monkeypatch)
    prompts = []

    class Seeing(NoisyBase):
        cameras, image_size = ("image", "wrist_image"), 8

        def with_prompts(self, words):
            prompts.append(words)
            return self

    monkeypatch.setattr(runs, "open_base", lambda *args, **kwargs: (Seeing(), dict))
    system, _ = runs.build(replace(LIBERO, physics="auto"))
    try:
        state = system.env.reset(keys(2))
        assert set(state.observation.images) == {"image", "wrist_image"} and state.observation.prompt is None
        assert prompts == [("reach the red goal", "reach the blue goal", "reach the green goal")]
    finally:
        system.env.close()


# --- the real one


@pytest.mark.libero
def test_libero_itself():
    """Episodes follow from their keys, whichever process plays them; one that is killed costs its episode alone."""
    cameras = (Camera("image", 224), Camera("wrist_image", 224))
    env = make_env("libero_spatial", camera=cameras, libero=LiberoOptions(train_inits="0:25"))
    assert isinstance(env, HostEnv) and len(env.spec.prompts) == 10 and env.spec.test_episodes == 500
    try:
        given = keys(2, 3)
        chunk = 0.3 * jax.random.normal(jax.random.key(1), (1, 5, 7))
        step, results = jax.jit(env.step), []
        for order in ([0, 1], [1, 0]):
            state = jax.jit(env.reset)(given[jnp.array(order)])
            for _ in range(2):
                state = step(state, jnp.tile(chunk, (2, 1, 1)))
            assert not np.any(state.done) and state.control_steps.tolist() == [10, 10]
            seen = state.observation._replace(prompt=None, prompt_mask=None, image_masks=None)
            results.append(jax.tree.map(lambda leaf: np.asarray(leaf)[order], seen))  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, *results)
        first, second = results[0].images["image"]
        assert first.std() > 10 and np.any(first != second)
        os.kill(pool_of(env).pids()[0], signal.SIGKILL)
        state = step(state, jnp.tile(chunk, (2, 1, 1)))
        assert state.fault.tolist() == [True, False]
        state = step(state, jnp.tile(chunk, (2, 1, 1)))
        assert not np.any(state.fault) and state.control_steps.tolist() == [0, 20]
        assert env.report() == {"worker_restarts": 1.0}
    finally:
        env.close()
