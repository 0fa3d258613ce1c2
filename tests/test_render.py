"""Camera images: equal to gym-aloha's, once per decision, and by processes that may die but never stay behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from env_contract import check_env, gentle_chunk
from fpo_jax.envs import aloha, aloha_render, make_env
from fpo_jax.envs.aloha_expert import plan
from fpo_jax.envs.aloha_mjx import AlohaMjx
from fpo_jax.envs.aloha_mujoco import AlohaMujoco
from fpo_jax.envs.aloha_render import RenderPool, render_episode, render_rows
from fpo_jax.images import resize_with_pad
from fpo_jax.types import Camera, FpoError
from opengl import opengl_pool

SMALL = Camera("top", 16, "fast")
NATIVE = Camera("top", 0)


@pytest.fixture(scope="module")
def pool():
    return opengl_pool()


@pytest.fixture
def single(pool):
    """A pool of one process, for tests that mistreat it."""
    pool = RenderPool(1)
    yield pool
    pool.close()


def positions(num: int, seed: int = 0) -> np.ndarray:
    """qpos [num, 23] with cubes all over the table, lying on it, and arms about the start."""
    rng = np.random.default_rng(seed)
    cubes = rng.uniform([0, 0.4, 0.02], [0.2, 0.6, 0.02], (num, 3))
    qpos = np.array(aloha.initial_qpos(cubes))
    qpos[:, :6] += rng.normal(0, 0.1, (num, 6))
    return qpos


def render_processes(parent: int) -> list[int]:
    """Its children that render and have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, ppid = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            if int(ppid) == parent and state != "Z" and b"aloha_render_worker" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


# --- equal to gym-aloha

GYM = """
import sys
import numpy as np
from gym_aloha.env import AlohaEnv
from gym_aloha.tasks import sim
from gym_aloha.utils import sample_box_pose

given = np.load(sys.argv[1])
env = AlohaEnv("transfer_cube", obs_type="pixels")
task = env._env.task
render, blank = task.get_observation, {"images": {"top": np.zeros((1, 1, 3), np.uint8)}}
observation, _ = env.reset(seed=0)
images = [observation["top"]]
sim.BOX_POSE[0] = np.concatenate([given["cube"], [1, 0, 0, 0]])
images.append(env._env.reset().observation["images"]["top"])
for step, action in enumerate(given["actions"].astype(np.float64), start=1):
    wanted = step % given["chunk"] == 0
    task.get_observation = render if wanted else lambda physics: blank
    observation, *_ = env.step(action)
    if wanted:
        images.append(observation["top"])
np.savez(sys.argv[2], images=images, seeded_cube=sample_box_pose(0)[:3])
"""


def test_every_pixel_equals_gym_aloha(pool, tmp_path):
    """As shipped, at resets and at the end of decisions in which the cube is grasped, lifted and carried."""
    chunk, decisions = 70, 3
    cube = np.array(aloha.sample_cube_position(jax.random.key(0))).astype(np.float64)
    actions = plan(cube).astype(np.float32)[: decisions * chunk]
    given, found = tmp_path / "given.npz", tmp_path / "found.npz"
    np.savez(given, cube=cube, actions=actions, chunk=chunk)
    environment = {**os.environ, "MUJOCO_GL": pool.opengl}
    environment.pop("PYOPENGL_PLATFORM", None)
    script = subprocess.run([sys.executable, "-c", GYM, given, found], env=environment, capture_output=True, text=True)
    assert script.returncode == 0, script.stderr
    with np.load(found) as result:
        expected, seeded_cube = result["images"], result["seeded_cube"]
    assert expected.shape == (2 + decisions, 480, 640, 3)

    seeded = pool.render_rows(np.asarray(aloha.initial_qpos(seeded_cube))[None], NATIVE)
    np.testing.assert_array_equal(seeded, expected[:1])
    env = AlohaMujoco(execute_steps=chunk, camera=NATIVE)
    state = env.reset_to(jnp.asarray(cube, jnp.float32)[None], jax.random.split(jax.random.key(0), 1))
    states = [state]
    for piece in actions.reshape(decisions, 1, chunk, 14):
        states.append(env.step(states[-1], jnp.asarray(piece)))
    for state, image in zip(states, expected[1:], strict=True):
        np.testing.assert_array_equal(state.observation.images["top"][0], image)
    assert states[-1].reward[0] >= 2  # the cube is in the air
    assert np.mean(expected[1] != expected[-1]) > 0.01


def test_fast_pictures_are_much_like_official_ones(pool):
    qpos = positions(2)
    official, fast = (pool.render_rows(qpos, Camera("top", 0, quality)).astype(int) for quality in ("official", "fast"))
    assert 0 < np.abs(official - fast).mean() < 3
    red = [(image[..., 0] > 150) & (image[..., 1] < 80) for image in (official, fast)]  # the cube
    assert red[0].any() and np.mean(red[0] != red[1]) < 1e-3


def test_pictures_are_resized_with_padding(pool):
    qpos = positions(2)
    whole = pool.render_rows(qpos, Camera("angle", 0, "fast"))
    resized = pool.render_rows(qpos, Camera("angle", 56, "fast"))
    np.testing.assert_array_equal(resized, resize_with_pad(whole, 56, 56))
    assert not resized[:, :7].any() and not resized[:, -7:].any()


# --- in the environment


def test_contract(pool):
    check_env(AlohaMujoco(episode_length=6, execute_steps=3, camera=SMALL), num_envs=3)


def test_one_picture_per_environment_and_decision(pool, monkeypatch):
    """Of the state in which the decision ended: after actions that are refused and a reset, too."""
    pictures = []
    submit = pool.submit
    monkeypatch.setattr(pool, "submit", lambda *args: pictures.append(args) or submit(*args))
    env = AlohaMujoco(execute_steps=2, camera=SMALL, renderer=pool)
    reset, step = jax.jit(env.reset), jax.jit(env.step)
    state = reset(jax.random.split(jax.random.key(0), 3))
    chunk = gentle_chunk(env, state)
    for actions, refused in ((chunk, 0), (chunk.at[0].set(jnp.nan), 1), (chunk, 0)):
        assert len(pictures) == 3
        images = state.observation.images
        assert images.keys() == {"top"}
        np.testing.assert_array_equal(images["top"], pool.render_rows(env.qpos(state), SMALL))
        pictures.clear()
        state = jax.block_until_ready(step(state, actions))
        np.testing.assert_array_equal(state.done, [refused, 0, 0])


def test_pictures_do_not_depend_on_the_number_of_processes(pool, single):
    qpos = positions(12)
    together = pool.render_rows(qpos, SMALL)
    np.testing.assert_array_equal(single.render_rows(qpos[::-1], SMALL)[::-1], together)
    pair = RenderPool(2)
    np.testing.assert_array_equal(pair.render_rows(qpos, SMALL), together)
    pair.close()
    assert len(np.unique(together, axis=0)) == len(qpos)


def test_large_pictures_in_a_scan(pool):
    """A callback's operands must be small, or it may wait for ever; its results may be large: 4 MB here."""
    env = AlohaMujoco(episode_length=2, execute_steps=1, camera=Camera("top", 0, "fast"))
    chunk = jnp.zeros((4, 50, 14))

    @jax.jit
    def rollout(state):
        return jax.lax.scan(lambda state, _: (env.step(state, chunk), state.observation.images["top"]), state, length=4)

    state, images = rollout(env.reset(jax.random.split(jax.random.key(0), 4)))
    assert images.shape == (4, 4, 480, 640, 3) and not np.any(state.fault)
    np.testing.assert_array_equal(
        state.observation.images["top"][1], pool.render_rows(env.qpos(state), NATIVE._replace(quality="fast"))[1]
    )


def test_environments_without_cameras(pool):
    with pytest.raises(FpoError, match="'point_mass' has no cameras"):
        make_env("point_mass", camera=SMALL)
    env = make_env("aloha_transfer_cube", "mujoco", camera=SMALL)
    state = env.reset(jax.random.split(jax.random.key(0), 2))
    assert state.observation.images["top"].shape == (2, 16, 16, 3)
    assert make_env("aloha_transfer_cube", "mujoco").reset(state.key).observation.images is None


@pytest.mark.parametrize(
    ("camera", "sentence"),
    [
        (Camera("below", 16), "no camera 'below'; there are: top"),
        (Camera("top", -1), "at least 1 pixel, or 0 for 480 x 640, not -1"),
        (Camera("top", 16, "offical"), "did you mean 'official'"),
    ],
)
def test_mistakes_are_one_sentence(camera, sentence):
    for mistake in (lambda: AlohaMujoco(camera=camera), lambda: render_rows(positions(1), camera)):
        with pytest.raises(FpoError, match=sentence):
            mistake()


# --- processes that break


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGINT])
def test_a_process_that_ends_or_is_stuck_is_replaced(pool, monkeypatch, number):
    """Ctrl-C in a terminal goes to every process of it, and must end none of these."""
    with monkeypatch.context() as patch:
        if number == signal.SIGSTOP:  # for the process that will be stuck; another picture may take as long as it likes
            patch.setattr(aloha_render, "_PICTURE_SECONDS", 5.0)
        single = RenderPool(1)
    before = set(render_processes(os.getpid()))
    env = AlohaMujoco(execute_steps=1, camera=SMALL, renderer=single)
    state = env.reset(jax.random.split(jax.random.key(0), 2))
    expected = env.step(state, gentle_chunk(env, state))
    (process,) = set(single._cpu_seconds)
    os.kill(process, number)
    result = env.step(state, gentle_chunk(env, state))
    assert not np.any(result.fault)
    np.testing.assert_array_equal(result.observation.images["top"], expected.observation.images["top"])
    after = set(render_processes(os.getpid()))
    assert len(after) == len(before) and (process in after) == (number == signal.SIGINT)
    single.close()
    assert len(render_processes(os.getpid())) == len(after) - 1


def test_without_pictures_there_are_only_faults(single, monkeypatch, caplog):
    """Nothing is raised in the callback, nothing is tried for ever, and it is said once."""
    env = AlohaMujoco(execute_steps=1, camera=SMALL, renderer=single)
    state = env.reset(jax.random.split(jax.random.key(0), 2))
    chunk = gentle_chunk(env, state)
    started = []
    monkeypatch.setattr(aloha_render, "_start", started.append)  # returns None, as where OpenGL no longer works
    (process,) = single._cpu_seconds
    os.kill(process, signal.SIGKILL)
    for _ in range(4):
        state = jax.jit(env.step)(state, chunk)
        assert np.all(state.fault) and not np.any(state.truncated | state.terminated)
        assert not np.any(state.observation.images["top"]) and np.all(np.isfinite(state.observation.proprio))
    assert 3 < len(started) < 8 and [record.levelname for record in caplog.records] == ["ERROR"]
    with pytest.raises(FpoError, match="keep ending"):
        single.render_rows(positions(1), SMALL)
    single.close()
    assert np.all(env.step(state, chunk).fault)
    with pytest.raises(FpoError, match="closed"):
        single.render_rows(positions(1), SMALL)


def test_closing_ends_a_process_that_is_drawing(pool):
    before = set(render_processes(os.getpid()))
    busy = RenderPool(1)
    (process,) = set(render_processes(os.getpid())) - before
    os.kill(process, signal.SIGSTOP)  # so that it still draws when the pool is closed
    pictures = [busy.submit(row, NATIVE) for row in positions(3)]
    while not pictures[0].running():
        time.sleep(0.001)
    busy.close()
    assert pictures[1].cancelled() and pictures[2].cancelled()
    os.kill(process, signal.SIGCONT)
    deadline = time.monotonic() + 120
    while set(render_processes(os.getpid())) != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(render_processes(os.getpid())) == before


def test_nobody_is_left_behind():
    """Not even by a process that is killed while its pictures are being drawn."""
    opengl_pool()
    script = """
import json, os, signal
import numpy as np
from fpo_jax.envs import aloha
from fpo_jax.envs.aloha_render import RenderPool
from fpo_jax.types import Camera

pool = RenderPool(2)
qpos = np.repeat(np.asarray(aloha.initial_qpos(np.array([[0.1, 0.5, 0.05]]))), 100, axis=0)

def progress(done, total):
    if len(pool._cpu_seconds) == 2:
        print(json.dumps(list(pool._cpu_seconds)), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

while True:  # until both draw
    pool.render_rows(qpos, Camera("top", 16, "fast"), progress=progress)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for process in json.loads(killed.stdout):
        stat = Path(f"/proc/{process}/stat")
        for _ in range(1200):
            try:
                if stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                    break
            except OSError:
                break
            time.sleep(0.1)
        else:
            pytest.fail("a render process outlived its parent")


# --- MJX-Warp's ray caster


def test_ray_cast_pictures_show_the_same_scene():
    """On Warp's CPU device: its kernels take half a minute to compile."""
    pytest.importorskip("warp")
    from fpo_jax.envs.aloha_raycast import RayCaster

    qpos = positions(3)
    for name, size in (("top", 224), ("angle", 0)):
        camera = Camera(name, size, "raycast")
        caster = RayCaster(camera)
        images = np.asarray(jax.jit(caster.look)(jnp.asarray(qpos, jnp.float32))).astype(int)
        official = opengl_pool().render_rows(qpos, camera._replace(quality="official"))
        assert images.shape == official.shape and np.abs(images - official).mean() < 8
        np.testing.assert_array_equal(caster.look(jnp.asarray(qpos[::-1], jnp.float32))[::-1], images)
        red = [(image[..., 0] > 150) & (image[..., 1] < 100) for image in (images, official)]
        assert red[1].any() and np.mean(red[0] != red[1]) < 2e-3


def test_ray_cast_pictures_need_warp(pool):
    for env in (AlohaMujoco, AlohaMjx):
        with pytest.raises(FpoError, match="needs physics='warp'"):
            env(camera=Camera("top", 16, "raycast"))


# --- OpenGL, and many rows


def test_without_opengl_the_packages_are_named(monkeypatch):
    tried = []
    monkeypatch.setattr(aloha_render, "_start", tried.append)
    monkeypatch.setitem(os.environ, "MUJOCO_GL", "osmesa")
    with pytest.raises(FpoError, match="libegl1 libegl-mesa0 libgl1-mesa-dri") as error:
        RenderPool()
    assert tried == ["osmesa", "egl"] and "\n" not in str(error.value)


def test_a_library_that_is_not_there_is_no_crash(monkeypatch):
    assert aloha_render._start("no such library") is None
    monkeypatch.setattr(aloha, "xml_path", lambda: Path("no_such_scene.xml"))
    with pytest.raises(FpoError, match=r"cannot start .*no_such_scene"):
        aloha_render._start("osmesa" if "osmesa" in os.environ.get("MUJOCO_GL", "") else "egl")


def test_progress_and_a_bad_row(single):
    qpos, calls = positions(5), []
    before = single.cpu_seconds()
    images = single.render_rows(qpos, SMALL, progress=lambda done, total: calls.append((done, total)))
    assert images.shape == (5, 16, 16, 3) and calls == [(done, 5) for done in range(1, 6)]
    assert single.cpu_seconds() > before == 0
    qpos[2, 0] = np.nan
    with pytest.raises(FpoError, match=r"not finite.*check the joint positions"):
        single.render_rows(qpos, SMALL)
    assert single.render_rows(qpos[:0], SMALL).shape == (0, 16, 16, 3)


def test_an_episode_for_a_video(pool):
    frames = render_episode(positions(2)[[0, 0, 1]], height=48, width=64)
    assert frames.shape == (3, 48, 64, 3) and frames.dtype == np.uint8
    np.testing.assert_array_equal(frames[0], frames[1])
    assert (frames[0] != frames[2]).any(axis=-1).sum() > 5
    with pytest.raises(FpoError, match="no camera 'below'; there are: top"):
        render_episode(positions(1), camera="below")
