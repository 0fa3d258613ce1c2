"""LIBERO itself in its worker: equal to openpi's client, independent episodes, faults, all 130 tasks."""

import re
import subprocess

import numpy as np
import pytest

from fpo_jax.envs import libero_files, libero_setup
from libero_venv import Client, installed, last_json, run_script

# --- LIBERO itself


@pytest.fixture(scope="module")
def worker():
    """A worker that draws."""
    python, assets = installed()
    client = Client(libero_setup.worker_command(python))
    hello = client.hello(assets)
    assert hello["failed"] == "" and hello["opengl"] in ("egl", "osmesa") and hello["pid"] == client.process.pid
    assert hello["versions"] == {"mujoco": "3.3.7", "robosuite": "1.4.0", "hf-libero": "0.1.4"}
    yield client
    client.close()


def actions(seed: int, *shape: int) -> np.ndarray:
    """Downwards on average, so that things are touched."""
    drawn = np.random.default_rng(seed).uniform(-1, 1, (*shape, 7))
    drawn[..., 2] -= 0.4
    return drawn.astype(np.float32)


def play(client: Client, suite: str, task: int, init: int | None, seed: int, order: str = "episode") -> list[dict]:
    """An episode of a few decisions: all that was seen."""
    answer = client.reset(suite, task, init, seed, order)
    assert answer["failed"] == "" and not answer["success"], answer
    seen = [client.seen()]
    for chunk in actions(1, 3, 5):
        answer = client.step(chunk)
        assert (answer["failed"], answer["steps"], answer["success"]) == ("", 5, False)
        seen.append(client.seen())
    return seen


def same(a: list[dict], b: list[dict], names: tuple[str, ...] = ("proprio", "objects", "images")) -> bool:
    return all(np.array_equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in names)


OPENPI = """
import json, os
python, assets, opengl, suite, task, episodes, actions, out = sys.argv[0], *sys.argv[1:]
os.environ.update(MUJOCO_GL=opengl, LIBERO_CONFIG_PATH=os.path.join(sys.prefix, "libero_config"))
import math
import numpy as np
from pathlib import Path
from PIL import Image
files = load("libero_files")
import libero.libero
libero.libero._assets_path_cache = assets
from libero.libero.envs import OffScreenRenderEnv

root = Path(libero.libero.__file__).parent
name = files.task_names(root)[suite][int(task)]
env = OffScreenRenderEnv(bddl_file_name=str(files.bddl_file(root, suite, name)), camera_heights=256, camera_widths=256)
env.seed(7)
found = {"proprio": [], "objects": [], "images": []}

def axis_angle(quaternion):  # as openpi's client computes it; nothing of the code under test
    *axis, w = quaternion.tolist()
    w = min(max(w, -1.0), 1.0)
    sine = math.sqrt(1.0 - w * w)
    return [part * 2.0 * math.acos(w) / sine if sine else 0.0 for part in axis]

def resized(picture):  # a square has no padding
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize((224, 224), resample=Image.BILINEAR))

def keep(obs):
    rotation = axis_angle(obs["robot0_eef_quat"])
    found["proprio"].append(np.concatenate([obs["robot0_eef_pos"], rotation, obs["robot0_gripper_qpos"]]))
    poses = np.zeros((32, 7))
    for i, thing in enumerate(env.env.objects_dict):
        poses[i] = [*obs[thing + "_pos"], *obs[thing + "_quat"][[3, 0, 1, 2]]]
    found["objects"].append(poses)
    images = [obs["agentview_image"], obs["robot0_eye_in_hand_image"]]
    found["images"].append([resized(image[::-1, ::-1]) for image in images])

for episode in range(int(episodes)):
    env.reset()
    env.set_init_state(files.inits(root, suite, name)[episode])
    for _ in range(10):
        obs, *_ = env.step([0.0] * 6 + [-1.0])
    keep(obs)
    for chunk in np.load(actions):
        for action in chunk:
            obs, _, done, _ = env.step(action.tolist())
            assert not done
        keep(obs)
env.close()
np.savez(out, **{name: np.array(values) for name, values in found.items()})
"""


@pytest.mark.libero
@pytest.mark.parametrize(("suite", "task"), [("libero_goal", 3), ("libero_10", 2)])
def test_all_is_equal_to_openpis_client(worker, tmp_path, suite, task):
    """States, poses and every pixel, with LIBERO's own environment and hard resets; from the last episode to the first.

    The tasks have drawers and a stove, whose initial joints LIBERO draws as often as it has been reset.
    """
    python, assets = installed()
    np.save(tmp_path / "actions.npy", actions(1, 3, 5))
    opengl = libero_setup.read_record(libero_setup.default_venv())["opengl"]
    arguments = (str(assets), opengl, suite, str(task), "3", str(tmp_path / "actions.npy"), str(tmp_path / "found.npz"))
    run_script(python, OPENPI, *arguments)
    with np.load(tmp_path / "found.npz") as archive:
        found = {name: archive[name].reshape(3, 4, *archive[name].shape[1:]) for name in archive.files}
    for episode in (2, 0, 1):
        for index, seen in enumerate(play(worker, suite, task, episode, 7, "openpi")):
            for name, array in seen.items():
                np.testing.assert_array_equal(array, found[name][episode, index].astype(array.dtype), name)


@pytest.mark.libero
@pytest.mark.parametrize("init", [5, None])
def test_an_episode_does_not_depend_on_those_before(worker, init):
    """A soft reset forgets where furniture stood, what the gripper did and which task was built."""
    first = play(worker, "libero_spatial", 4, init, seed=3)
    other = play(worker, "libero_spatial", 4, init, seed=4)
    assert not same(first[:1], other[:1], ("images",))  # where furniture stands
    assert same(first, play(worker, "libero_spatial", 4, init, seed=3))
    play(worker, "libero_object", 0, 1, seed=3)
    assert same(first, play(worker, "libero_spatial", 4, init, seed=3))


@pytest.mark.libero
def test_states_do_not_depend_on_drawing(worker):
    python, assets = installed()
    blind = Client(libero_setup.worker_command(python))
    try:
        assert blind.hello(assets, [])["opengl"] == "disable"
        for init in (7, None):
            expected = play(worker, "libero_10", 0, init, seed=1)
            assert same(expected, play(blind, "libero_10", 0, init, seed=1), ("proprio", "objects"))
    finally:
        blind.close()


@pytest.mark.libero
def test_fast_pictures_are_much_like_official_ones(worker):
    python, assets = installed()
    fast = Client(libero_setup.worker_command(python))
    try:
        fast.hello(assets, quality="fast")
        official, quick = (play(client, "libero_goal", 0, 0, seed=0)[0]["images"] for client in (worker, fast))
        difference = np.abs(official.astype(int) - quick).mean(axis=(1, 2, 3))
        assert np.all(difference > 0) and np.all(difference < 8), difference
    finally:
        fast.close()


@pytest.mark.libero
def test_all_130_tasks_are_known(worker):
    suites = worker.ask("tasks")["suites"]
    assert {name: len(tasks) for name, tasks in suites.items()} == {
        name: 90 if name == "libero_90" else 10 for name in libero_files.SUITES
    }
    for task in (task for tasks in suites.values() for task in tasks):
        assert task["inits"] == 50 and task["language"] and re.fullmatch(r"[a-z ]+", task["prompt"]), task
        assert task["objects"] and task["goal"].startswith("("), task
    for suite, index in (("libero_90", 56), ("libero_object", 3), ("libero_goal", 3)):
        assert suites[suite][index]["objects"] == worker.reset(suite, index, 0)["objects"]


@pytest.mark.libero
def test_what_cannot_be_is_a_fault_and_the_worker_goes_on(worker):
    assert worker.reset("libero_goal", 10, 0)["failed"] == "protocol: there is no task 10 in suite 'libero_goal'"
    assert worker.reset("libero_gaol", 0, 0)["failed"].startswith("protocol: there is no task")
    assert "initial states 0 to 49, but not 50" in worker.reset("libero_goal", 0, 50)["failed"]
    for init, order in ((None, "openpi"), (0, "random")):
        assert worker.reset("libero_goal", 0, init, 0, order)["failed"].startswith("protocol: the order is episode or")
    for value in (np.nan, np.inf):
        assert worker.reset("libero_goal", 0, 0)["failed"] == ""
        assert worker.step(np.full((5, 7), value))["failed"] == "physics: an action is not finite"
        assert worker.step(np.zeros((5, 7)))["failed"] == "protocol: an episode must begin with a reset"
    assert worker.reset("libero_goal", 0, 0)["failed"] == ""
    for length in (0, -1, 51):
        assert worker.ask("step", length=length)["failed"].startswith("protocol: a decision has 1 to 50 control steps")
    assert worker.step(np.full((5, 7), 1e30))["steps"] == 5  # clipped, as LIBERO does


SCRIPT = """
import json, os
import numpy as np
starter = load("libero_worker")
worker = starter.Worker()
starter.use_opengl("disable")
worker._import(sys.argv[1])
wire, files, simulator = sys.modules.get("wire") or load("wire"), worker.files, load("libero_simulator")
plan = wire.layout(8, [], 50)
arrays = wire.views(bytearray(plan.size), plan)
sim = simulator.Simulator(arrays)
name = worker.names["libero_goal"][0]
sim.build(files.bddl_file(worker.root, "libero_goal", name), files.inits(worker.root, "libero_goal", name))
found = []
for value in (np.nan, 1e12):
    sim.reset(0, 0, "episode")
    sim.env.sim.data.qvel[0] = value
    try:
        sim.step(5)
    except simulator.Failure as failure:
        found.append(str(failure))
sim.reset(0, 0, "episode")
opened = sim.env.object_sites_dict["wooden_cabinet_1_middle_region"].joints
for steps in (3, 50):
    sim.step(steps)
    for joint in opened:
        sim.env.sim.data.set_joint_qpos(joint, -0.16)
found.append(sim.step(5))
found.append(sim.reset(0, 0, "episode"))
print(json.dumps(found))
"""


@pytest.mark.libero
def test_broken_physics_are_a_fault_and_success_ends_a_decision():
    """MuJoCo silently starts anew where numbers explode; LIBERO's own check sees a drawer that is open."""
    python, assets = installed()
    *faults, opened, begun = last_json(run_script(python, SCRIPT, str(assets)))
    assert len(faults) == 2 and all(fault.startswith("physics: ") for fault in faults), faults
    assert opened == [1, True] and begun is False


@pytest.mark.libero
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MUJOCO_GL": "glfw", "DISPLAY": "", "WAYLAND_DISPLAY": ""}, ("egl", "osmesa")),  # it needs a display
        ({"MUJOCO_GL": "egl", "__EGL_VENDOR_LIBRARY_DIRS": "/no_drivers"}, ("osmesa",)),
        ({"MUJOCO_GL": "", "CUDA_VISIBLE_DEVICES": "GPU-8f1"}, ("egl", "osmesa")),  # robosuite takes it for a number
    ],
)
def test_another_opengl_library_takes_over(environment, expected):
    """In the same process."""
    if expected == ("osmesa",) and b"OSMesa" not in subprocess.check_output(["ldconfig", "-p"]):
        pytest.skip("OSMesa is not installed")
    python, assets = installed()
    client = Client(libero_setup.worker_command(python), environment)
    try:
        hello = client.hello(assets)
        assert hello["failed"] == "" and hello["opengl"] in expected and hello["pid"] == client.process.pid
        assert bool(hello["opengl_failed"]) == bool(environment["MUJOCO_GL"])  # the one that was asked for
        assert client.reset("libero_object", 0, 0)["failed"] == ""
        assert client.seen()["images"].std() > 10
    finally:
        client.close()


@pytest.mark.slow
@pytest.mark.libero
@pytest.mark.timeout(7200)
def test_every_task_builds_resets_simulates_and_draws():
    from libero_tasks import Args, visit

    installed()
    count = 0
    for seen in visit(Args(inits=(0, 49))):
        count += 1
        assert not seen.failed and not seen.done and seen.objects >= 1, seen
        assert min(seen.pictures) > 10, seen
        assert seen.moved < 0.1, seen  # a carton falls over in libero_90/54, but nothing is thrown into the air
    assert count == 130
