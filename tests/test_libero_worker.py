"""LIBERO's worker: what openpi's client sees bit for bit, resets that forget the past, faults instead of crashes."""

import io
import json
import os
import pickle
import re
import signal
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from fpo_jax.envs import libero_files, libero_simulator, libero_worker
from fpo_jax.images import resize_with_pad
from libero_venv import Client, run_script

NAMES = {
    "libero_spatial": ["pick_up_the_bowl"],
    "libero_object": ["pick_up_the_milk"],
    "libero_goal": ["turn_on_the_stove"],
    "libero_10": ["LIVING_ROOM_SCENE2_put_both_the_cream_cheese_box_and_the_butter_in_the_basket"],
    "libero_90": ["KITCHEN_SCENE10_close_the_top_drawer", "STUDY_SCENE1_pick_up_the_book"],
}


# --- LIBERO's files, without LIBERO


def save_inits(path: Path, content: object) -> None:
    """As torch.save writes it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3\n")


OBJECTS, GOAL = ("milk_1", "milk_2", "tray_1"), "(In milk_1 tray_1_contain_region) (Close box_1)"


@pytest.fixture
def package(tmp_path):
    """A folder with hf-libero's files for a few tasks."""
    root = tmp_path / "site" / "libero" / "libero"
    (root / "benchmark").mkdir(parents=True)
    (root / "benchmark" / "libero_suite_task_map.py").write_text(f"libero_task_map = {NAMES!r}\n")
    for suite, names in NAMES.items():
        for kind in ("bddl_files", "init_files"):
            (root / kind / suite).mkdir(parents=True)
        for name in names:
            bddl = f"(define (problem P)\n (:language Do   {name.lower()}\n it)\n (:objects\n milk_1 milk_2 - milk\n"
            bddl += "  tray_1 - tray\n )\n (:goal\n (And (In milk_1\n tray_1_contain_region) (Close box_1))\n ))"
            libero_files.bddl_file(root, suite, name).write_text(bddl)
            save_inits(root / "init_files" / suite / f"{name}.pruned_init", np.zeros((3, 5)))
    return root


def test_prompts_come_from_file_names():
    assert libero_files.prompt("pick_up_the_milk") == "pick up the milk"
    for name, scene in ((NAMES["libero_10"][0], "LIVING_ROOM_SCENE2_"), (NAMES["libero_90"][0], "KITCHEN_SCENE10_")):
        assert libero_files.prompt(name) == name.removeprefix(scene).replace("_", " ")


def test_tasks_are_read_without_libero(package):
    tasks = libero_files.tasks(package)
    assert {suite: [task.name for task in tasks[suite]] for suite in tasks} == NAMES
    task = tasks["libero_90"][0]
    sentence = "Do kitchen_scene10_close_the_top_drawer it"
    assert task == (NAMES["libero_90"][0], "close the top drawer", sentence, 3, OBJECTS, GOAL)
    (package / "benchmark" / "libero_suite_task_map.py").write_text("something = {}")
    with pytest.raises(ValueError, match="libero_task_map"):
        libero_files.tasks(package)


def test_initial_states_are_read(tmp_path):
    expected = np.random.default_rng(0).normal(size=(50, 77))
    save_inits(tmp_path / "a", expected)
    old = pickle.dumps(expected, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    with zipfile.ZipFile(tmp_path / "b", "w") as archive:
        archive.writestr("b/data.pkl", old)  # as NumPy 1 wrote it
    for name in "ab":
        np.testing.assert_array_equal(libero_files.read_inits(tmp_path / name), expected)


class Command:
    def __reduce__(self):
        return (os.system, ("echo this must never run",))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (Command(), "it wants posix.system"),
        ({"states": Command()}, "it wants posix.system"),
        (re.compile("a"), "it wants re._compile"),
        (np.float64(1), "it wants numpy"),
        ([1, 2], "holds no table"),
        (np.zeros((2, 2), np.float32), "holds no table"),
        (np.zeros(2), "holds no table"),
        (np.array([[1.0, np.nan]]), "not finite"),
        (np.array([[Command()]], object), "it wants posix.system"),
    ],
)
def test_a_file_of_states_that_holds_anything_else_is_refused(tmp_path, capfd, content, why):
    save_inits(tmp_path / "task.pruned_init", content)
    with pytest.raises(ValueError, match=rf"^task.pruned_init .*{why}"):
        libero_files.read_inits(tmp_path / "task.pruned_init")
    assert "never run" not in capfd.readouterr().out


def test_a_file_that_is_no_zip_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"no zip")
    (tmp_path / "b").write_bytes(pickle.dumps(Command()))
    with zipfile.ZipFile(tmp_path / "c", "w") as archive:
        archive.writestr("c/data.pkl", b"\x80\x02}q")
    for name in "abc":
        with pytest.raises(ValueError, match="no file of initial states"):
            libero_files.read_inits(tmp_path / name)


def test_the_config_is_written_once(tmp_path, package):
    folder = tmp_path / "config"
    libero_files.write_config(folder, package, "/assets")
    first = (folder / "config.yaml").stat()
    config = json.loads((folder / "config.yaml").read_text())
    assert set(config) == {"assets", "bddl_files", "benchmark_root", "datasets", "init_states"}
    assert config["init_states"] == str(package / "init_files") and config["assets"] == "/assets"
    libero_files.write_config(folder, package, "/assets")
    assert (folder / "config.yaml").stat() == first and list(folder.iterdir()) == [folder / "config.yaml"]
    libero_files.write_config(folder, package, "/others")
    assert json.loads((folder / "config.yaml").read_text())["assets"] == "/others"


def test_stand_ins_are_counted(tmp_path):
    (tmp_path / "assets").mkdir()
    assert libero_files.stand_ins(tmp_path / "assets") == 0
    rows = ("path\tbytes\tsha256\torigin", "a\t1\tx\toriginal", "b\t1\tx\tstand-in", "c\t1\tx\tstand-in")
    (tmp_path / "MANIFEST.tsv").write_text("\n".join(rows))
    assert libero_files.stand_ins(tmp_path / "assets") == 2


# --- the simulator's own few lines


@pytest.mark.parametrize("shape", [(256, 256), (480, 640), (50, 20), (224, 224), (2, 300)])
def test_pictures_are_resized_as_openpi_does(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)[::-1, ::-1]
    expected = resize_with_pad(np.ascontiguousarray(image), 224, 224)
    np.testing.assert_array_equal(libero_simulator.resize_with_pad(image, 224), expected)


def test_axis_and_angle():
    half = np.deg2rad(35)
    axis = np.array([2.0, -1.0, 2.0]) / 3
    found = libero_simulator.axis_angle(np.array([*(np.sin(half) * axis), np.cos(half)]))
    np.testing.assert_allclose(found, 2 * half * axis, rtol=1e-12)
    for w in (1.0, -1.0, 1.0 + 1e-9):
        np.testing.assert_array_equal(libero_simulator.axis_angle(np.array([0, 0, 0, w])), np.zeros(3))


def test_what_only_pictures_need_is_dropped():
    xml = """<mujoco><asset><texture name="t" file="t.png"/><material name="m" texture="t" rgba="1 1 1 1"/>
    <mesh name="look" file="a.msh"/><mesh name="touch" file="b.stl"/></asset><worldbody><body>
    <geom name="g0" type="mesh" mesh="look" group="1" contype="0" conaffinity="0" material="m"/>
    <geom name="g1" type="mesh" mesh="touch" group="0"/></body></worldbody></mujoco>"""
    root = ElementTree.fromstring(libero_simulator.without_looks(xml))
    asset = root.find("asset")
    assert asset is not None
    assert [(part.tag, part.get("name")) for part in asset] == [("material", "m"), ("mesh", "touch")]
    look, touch = root.iter("geom")
    assert (look.get("name"), look.get("type"), look.get("mesh")) == ("g0", "sphere", None)
    assert (touch.get("type"), touch.get("mesh")) == ("mesh", "touch") and asset[0].get("texture") is None


def test_a_failure_is_one_short_line():
    failure = str(libero_simulator.Failure("physics", ValueError("a\n  b" + 1000 * "c")))
    assert failure.startswith("physics: ValueError: a b") and "\n" not in failure and len(failure) < 600


# --- the process, without LIBERO


@pytest.fixture
def client(package):
    client = Client([sys.executable, "-P", libero_worker.__file__], {"PYTHONPATH": str(package.parents[1])})
    yield client
    client.close()


def test_a_worker_says_what_is_wrong_and_goes_on(client):
    assert client.ask("dance")["failed"] == "protocol: there is no request 'dance'"
    assert client.ask("reset", suite="libero_90")["failed"].startswith("protocol: TypeError")
    for op, fields in (("step", {"length": 1}), ("reset", {"suite": "libero_90", "task": 0, "init": 0, "seed": 0})):
        assert client.ask(op, **fields)["failed"] == "protocol: say hello first"
    tasks = client.ask("tasks")
    assert tasks["failed"] == "" and tasks["suites"]["libero_90"][1]["prompt"] == "pick up the book"
    assert client.hello(Path(), ["below"])["failed"] == "protocol: there is no camera 'below'"
    assert client.hello(Path(), [])["failed"].startswith("task: ImportError: robosuite")
    assert client.ask("close") == {"failed": ""} and client.process.wait(300) == 0


def test_without_opengl_the_packages_are_named(package):
    tried = json.dumps({"tried": ["egl", "osmesa", "glfw"], "reason": "OSError: libfancy"})
    client = Client([sys.executable, "-P", libero_worker.__file__, tried], {"PYTHONPATH": str(package.parents[1])})
    try:
        failed = client.hello(Path())["failed"]
        assert failed.startswith("render: no OpenGL library works (OSError: libfancy)") and "libegl1" in failed
    finally:
        client.close()


def test_a_worker_imports_neither_jax_nor_fpo_jax():
    script = """
import builtins, sys
def refuse(name, *rest, original=builtins.__import__):
    assert name.split(".")[0] not in {"jax", "jaxtyping", "fpo_jax", "torch"}, name
    return original(name, *rest)
builtins.__import__ = refuse
for name in ("wire", "libero_files", "libero_simulator", "libero_worker"):
    load(name)
"""
    run_script(Path(sys.executable), script)


def test_a_worker_ends_with_the_other_end(client):
    client.ask("tasks")
    os.kill(client.process.pid, signal.SIGINT)  # Ctrl-C is not for it
    client.ask("tasks")
    client.connection.close()
    assert client.process.wait(300) == 0


def test_the_pickles_of_this_file_are_dangerous():
    """Else the tests above prove nothing."""
    with pytest.raises(pickle.UnpicklingError):
        libero_files._ArrayUnpickler(io.BytesIO(pickle.dumps(Command()))).load()
    assert pickle.dumps(Command()).count(b"system") == 1
