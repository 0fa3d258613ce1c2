"""LIBERO's set-up: what is missing is said in one sentence, what is done is not done again."""

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import libero_tasks
import pytest

from fpo_jax.envs import libero_files, libero_setup
from fpo_jax.envs.workers import StartError
from fpo_jax.types import FpoError
from libero_venv import installed
from tiny_libero import COMMAND

NEEDED = Path(libero_setup.__file__).with_name("libero_assets.txt").read_text().splitlines()


@pytest.fixture
def venv(tmp_path, monkeypatch):
    """Where the default virtual environment is to be."""
    monkeypatch.setenv("FPO_JAX_LIBERO", str(tmp_path / "venv"))
    return tmp_path / "venv"


@pytest.fixture
def pack(tmp_path):
    """Assets with every file that is needed, and a manifest."""
    rows = ["path\tbytes\tsha256\torigin"]
    for name in NEEDED:
        file = tmp_path / "pack" / "assets" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
        origin = "stand-in" if name.endswith("plate/texture.png") else "original"
        rows.append(f"{name}\t{len(name)}\t{hashlib.sha256(name.encode()).hexdigest()}\t{origin}")
    (tmp_path / "pack" / "MANIFEST.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path / "pack"


def complaint(action) -> str:
    with pytest.raises(FpoError) as error:
        action()
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    return text


# --- where things are


def test_the_default_place(monkeypatch, tmp_path):
    monkeypatch.delenv("FPO_JAX_LIBERO", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert libero_setup.default_venv() == tmp_path / "fpo_jax" / "libero"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert libero_setup.default_venv() == Path.home() / ".cache" / "fpo_jax" / "libero"
    monkeypatch.setenv("FPO_JAX_LIBERO", "~/elsewhere")
    assert libero_setup.default_venv() == Path.home() / "elsewhere"


def test_finding_what_was_set_up(venv, tmp_path):
    assert "python -m fpo_jax.envs.libero_setup --assets" in complaint(libero_setup.find)
    venv.mkdir()
    (venv / libero_files.RECORD).write_text("{")  # an interrupted run
    assert "not set up" in complaint(libero_setup.find)
    (tmp_path / "assets").mkdir()
    record = {"python": sys.executable, "assets": str(tmp_path / "assets")}
    (venv / libero_files.RECORD).write_text(json.dumps(record))
    assert libero_setup.find() == (Path(sys.executable), tmp_path / "assets")
    assert libero_setup.find(assets=str(tmp_path)) == (Path(sys.executable), tmp_path)
    assert "no_such" in complaint(lambda: libero_setup.find(assets=str(tmp_path / "no_such")))
    (venv / libero_files.RECORD).unlink()
    assert libero_setup.find(sys.executable, str(tmp_path)) == (Path(sys.executable), tmp_path)


# --- assets


def test_assets_are_found_in_what_users_have(pack, tmp_path):
    assets = pack / "assets"
    for given in (assets, pack, tmp_path):
        assert libero_setup.locate_assets(given) == assets
    checkout = tmp_path / "LIBERO" / "libero" / "libero"
    checkout.mkdir(parents=True)
    shutil.move(assets, checkout)
    for given in (tmp_path / "LIBERO", tmp_path):
        assert libero_setup.locate_assets(given) == checkout / "assets"
    assert "Lifelong-Robot-Learning/LIBERO" in complaint(lambda: libero_setup.locate_assets(pack))


def test_assets_are_compared_with_their_manifest(pack):
    assets = pack / "assets"
    assert libero_setup.check_assets(assets) == (
        "all as in MANIFEST.tsv; 1 are stand-ins: results on pictures are not official"
    )
    (assets / NEEDED[3]).write_text("x" * len(NEEDED[3]))  # of the right size
    assert f"in 1 ({NEEDED[3]}) files" in complaint(lambda: libero_setup.check_assets(assets))


def test_assets_without_a_manifest_need_all_files(pack):
    (pack / "MANIFEST.tsv").unlink()
    assets = pack / "assets"
    (assets / "something_else.txt").touch()
    assert libero_setup.check_assets(assets) == f"all {len(NEEDED)} files that LIBERO's 130 tasks need"
    for name in NEEDED[:4]:
        (assets / name).unlink()
    text = complaint(lambda: libero_setup.check_assets(assets))
    assert f"lacks 4 ({', '.join(NEEDED[:3])}, ...) of {len(NEEDED)} files" in text


def test_without_assets_it_says_where_they_are(venv, tmp_path):
    text = complaint(lambda: list(libero_setup.set_up()))
    assert "Lifelong-Robot-Learning/LIBERO" in text and "--assets FOLDER" in text
    assert "no_such" in complaint(lambda: list(libero_setup.set_up(tmp_path / "no_such")))
    assert "holds no LIBERO assets" in complaint(lambda: list(libero_setup.set_up(tmp_path)))
    assert not venv.exists()


def test_the_command_fails_with_one_sentence(venv):
    command = [sys.executable, "-m", "fpo_jax.envs.libero_setup"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("Error: LIBERO's assets are missing")
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


# --- the virtual environment


def test_a_folder_with_other_things_is_left_alone(venv, pack):
    venv.mkdir()
    (venv / "thesis.tex").touch()
    assert "choose another --venv" in complaint(lambda: list(libero_setup.set_up(pack)))
    assert [file.name for file in venv.iterdir()] == ["thesis.tex"]


def test_what_pip_says_is_passed_on(venv, pack, monkeypatch):
    pip = "import sys; print('ERROR: No matching distribution found for mujoco==3.3.7'); sys.exit('and more')"
    run = libero_setup._run
    monkeypatch.setattr(
        libero_setup, "_run", lambda complaint, command: run(complaint, [sys.executable, "-S", "-c", pip])
    )
    text = complaint(lambda: list(libero_setup.set_up(pack)))
    assert "cannot be made (ERROR: No matching distribution found for mujoco==3.3.7)" in text
    assert "no_such_program" in complaint(lambda: run("It fails", ["no_such_program"]))


def test_nothing_is_done_twice(venv, pack, tmp_path, monkeypatch):
    """The archive is unpacked and the packages are installed once; another archive is unpacked anew."""
    commands = []

    def run(complaint, command):
        commands.append(command[1:3])
        if command[1:3] == ["-m", "venv"]:
            libero = venv / "bin" / "python"
            libero.parent.mkdir(parents=True)
            libero.touch()
            (venv / "pyvenv.cfg").touch()
        if command[1] == "-c":
            assert command[2] == libero_setup._UNPACK
            shutil.copytree(pack, Path(command[4]) / "pack")

    hello = {"opengl": "egl", "versions": {"mujoco": "3.3.7"}, "stand_ins": 1}
    monkeypatch.setattr(libero_setup, "_run", run)
    monkeypatch.setattr(libero_setup, "try_out", lambda python, assets: (hello, "one reset"))
    archive = tmp_path / "pack.tar.zst"
    archive.write_text("1")
    lines = list(libero_setup.set_up(archive))
    assert [command[:2] for command in commands[:3]] == [["-m", "venv"], ["-m", "pip"], ["-m", "pip"]]
    assert len(commands) == 4 and "made" in lines[0] and "unpacked from pack.tar.zst" in lines[1]
    assert lines[-1] == "LIBERO is ready: mujoco 3.3.7."
    assert libero_setup.find() == (venv / "bin" / "python", venv / "assets" / "pack" / "assets")

    first = libero_setup.read_record(venv)
    assert first["stand_ins"] == 1 and first["opengl"] == "egl"
    for given in (archive, None):
        lines = list(libero_setup.set_up(given))
        assert len(commands) == 4 and "was there" in lines[0] and "unpacked before" in lines[1]
        assert libero_setup.read_record(venv) == first
    archive.unlink()  # what was unpacked stays
    list(libero_setup.set_up())
    assert len(commands) == 4 and libero_setup.read_record(venv) == first
    archive.write_text("another")
    list(libero_setup.set_up())
    assert len(commands) == 5 and libero_setup.read_record(venv) != first
    lines = list(libero_setup.set_up(pack))
    assert len(commands) == 5 and "used where it is" in lines[1]
    assert libero_setup.find()[1] == pack / "assets"


def fake_libero_python(tmp_path, monkeypatch, told: dict, crash: str = "") -> Path:
    """Stands for the Python of LIBERO's virtual environment: it runs fake workers, or `crash` before them."""
    python = tmp_path / "python"
    command = " ".join(map(shlex.quote, COMMAND))
    python.write_text(f"#!/bin/sh\n{crash}\nexec {command}\n")
    python.chmod(0o755)
    monkeypatch.setenv("FAKE_WORKER", json.dumps(told))
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    return python


def test_without_opengl_the_set_up_is_for_states_only(tmp_path, monkeypatch):
    told = {"fail_drawing": "render: no OpenGL library works"}
    hello, seen = libero_setup.try_out(fake_libero_python(tmp_path, monkeypatch, told), tmp_path)
    assert "NO PICTURES" in seen and "no OpenGL library works" in seen and hello["versions"] == {"fake": "1"}


def test_only_a_driver_that_crashes_is_replaced(tmp_path, monkeypatch):
    """And where the replacement crashes too, both reasons are told; nothing else is tried twice."""
    python = fake_libero_python(tmp_path, monkeypatch, {}, 'test "$MUJOCO_GL" = osmesa || kill -SEGV $$')
    assert libero_setup.try_out(python, tmp_path)[1].startswith("one reset, one step, 2 pictures of 224 x 224")
    python = fake_libero_python(tmp_path, monkeypatch, {}, "kill -SEGV $$")
    with pytest.raises(StartError) as crashed, libero_setup.worker(python, tmp_path, "libero_spatial"):
        pass
    assert crashed.value.reason == (
        "render: first it died: exit status -11; with MUJOCO_GL=osmesa died: exit status -11"
    )
    python = fake_libero_python(tmp_path, monkeypatch, {}, f"echo x >> {tmp_path}/tries; echo no libero >&2; exit 1")
    with (
        pytest.raises(StartError, match="exit status 1, no libero"),
        libero_setup.worker(python, tmp_path, "libero_90"),
    ):
        pass
    assert (tmp_path / "tries").read_text() == "x\n"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"suites": ("libero_9",)}, "LIBERO has no suite 'libero_9'; did you mean"),
        ({"tasks": (0, 99)}, "libero_spatial has the tasks 0 to 2, so there is no libero_spatial/99"),
        ({"idle_steps": 60}, "--idle-steps must be 1 to 50, not 60"),
    ],
)
def test_the_table_of_tasks_names_mistakes(options, sentence, tmp_path, monkeypatch):
    python = fake_libero_python(tmp_path, monkeypatch, {})
    monkeypatch.setattr(libero_setup, "find", lambda: (python, tmp_path))
    args = libero_tasks.Args(**{"suites": ("libero_spatial",), **options})
    with pytest.raises(FpoError, match=sentence):
        list(libero_tasks.visit(args))


def test_the_table_of_tasks_fails_where_a_task_does(tmp_path, monkeypatch, capsys):
    told = {"faults": {"physics": 0.5}}
    monkeypatch.setattr(libero_setup, "find", lambda: (fake_libero_python(tmp_path, monkeypatch, told), tmp_path))
    args = libero_tasks.Args(suites=("libero_spatial",), inits=(0, 1))
    assert libero_tasks.main(args) == 2
    captured = capsys.readouterr()
    failed = [line.split(" | ")[0].strip("| ") for line in captured.out.splitlines() if "physics: told" in line]
    assert failed and captured.err == f"Error: {len(failed)} tasks do not work: {', '.join(failed)}.\n"
    told.clear()
    assert libero_tasks.main(args) == 0


# --- LIBERO itself


@pytest.mark.libero
def test_setting_up_again_installs_nothing(monkeypatch):
    python, assets = installed()
    monkeypatch.setattr(libero_setup, "_run", lambda complaint, command: pytest.fail(f"{complaint}: {command}"))
    lines = list(libero_setup.set_up())
    assert "was there" in lines[0] and lines[-1].startswith("LIBERO is ready: mujoco 3.3.7")
    assert libero_setup.find() == (python, assets)
    assert (libero_setup.default_venv() / libero_files.CONFIG / "config.yaml").is_file()
