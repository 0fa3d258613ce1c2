"""Sets up LIBERO in a virtual environment of its own, once, and checks that it simulates and draws.

python -m fpo_jax.envs.libero_setup --assets FOLDER

LIBERO needs an older MuJoCo than fpo_jax, and assets that no package has: pictures and meshes, which are the folder
libero/libero/assets of its repository (Lifelong-Robot-Learning/LIBERO on GitHub). Running it again is harmless.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from fpo_jax.envs import libero_files
from fpo_jax.envs.host import Episode
from fpo_jax.envs.libero import CAMERAS, pool_by_any_renderer
from fpo_jax.envs.workers import StartError, WorkerSettings
from fpo_jax.types import FpoError

# MuJoCo 3.4.0 changed how boxes that overlap are pushed apart: with it, things fly off in LIBERO's living rooms.
PACKAGES = (
    *("mujoco==3.3.7", "numpy>=2,<2.5", "numba", "scipy", "pillow", "opencv-python-headless", "networkx", "pyyaml"),
    *("cloudpickle", "easydict", "future", "gymnasium", "matplotlib", "termcolor", "zstandard"),
)
# Without what they declare to depend on, which is much that no simulation uses (torch, transformers, ...).
BARE_PACKAGES = ("robosuite==1.4.0", "bddl==1.0.1", "hf-libero==0.1.4")

MAX_CHUNK = 50  # actions at a time, of `worker`
_COMMAND = "python -m fpo_jax.envs.libero_setup"
_WHERE = "the folder libero/libero/assets of the repository Lifelong-Robot-Learning/LIBERO on GitHub"
_PLACES = ("", "assets", "libero/libero/assets", "*/assets", "*/libero/libero/assets")  # of assets in what users give
_UNPACK = """
import sys, tarfile, zstandard
with open(sys.argv[1], "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        archive.extractall(sys.argv[2], filter="data")
"""


@dataclass(frozen=True)
class Args:
    assets: Path | None = None  # LIBERO's assets: a folder (stays where it is), or a .tar.zst (is unpacked)
    venv: Path | None = None  # where to make the virtual environment (about 1.5 GB)


def default_venv() -> Path:
    """$FPO_JAX_LIBERO, or fpo_jax/libero in the user's cache."""
    if os.environ.get("FPO_JAX_LIBERO"):
        return Path(os.environ["FPO_JAX_LIBERO"]).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "fpo_jax" / "libero"


def read_record(venv: Path) -> dict[str, Any]:
    """What the last set-up in this virtual environment did, {} where it was not finished."""
    try:
        return json.loads((venv / libero_files.RECORD).read_text())
    except (OSError, ValueError):
        return {}


def find(python: str | None = None, assets: str | None = None) -> tuple[Path, Path]:
    """(Python of LIBERO's virtual environment, assets): those that are given, else those of the set-up.

    Raises FpoError where LIBERO is not set up, or no longer there.
    """
    record = {} if python and assets else read_record(default_venv())
    if not (python and assets) and not record:
        raise FpoError(f"LIBERO is not set up: run `{_COMMAND} --assets FOLDER`, where FOLDER is {_WHERE}.")
    # Absolute, as workers work elsewhere; links stay, as a virtual environment's Python is one.
    found = [Path(place).expanduser().absolute() for place in (python or record["python"], assets or record["assets"])]
    for place in found:
        if not place.exists():
            raise FpoError(f"There is no {place}: name what is there, or run `{_COMMAND} --assets FOLDER` again.")
    return found[0], found[1]


def worker_command(python: Path) -> tuple[str, ...]:
    """What starts a worker."""
    return (str(python), "-P", str(Path(__file__).with_name("libero_worker.py")))


def set_up(assets: Path | None = None, venv: Path | None = None) -> Iterable[str]:
    """Do all that is still to be done, and say what was done, line by line. Raises FpoError."""
    venv = (venv or default_venv()).expanduser().absolute()
    record = read_record(venv)
    stamp = record.get("stamp")
    source = assets or (Path(record["source"]) if record else None)
    if source is None:
        raise FpoError(f"LIBERO's assets are missing: get {_WHERE}, then run `{_COMMAND} --assets FOLDER`.")
    source = source.expanduser().absolute()
    if not source.exists() and not (record.get("source") == str(source) and (venv / "assets").is_dir()):
        raise FpoError(f"There are no assets at {source}: give --assets {_WHERE}.")
    if source.is_dir():
        locate_assets(source)  # before the long work
    python = venv / "bin" / "python"
    yield make_venv(venv, python, record)
    folder, done = (source, "used where it is") if source.is_dir() else unpack(source, venv, python, record)
    folder = locate_assets(folder)
    yield f"Assets: {folder} ({done}), {check_assets(folder)}."
    hello, seen = try_out(python, folder)
    yield f"Tried: {seen}."
    versions = hello["versions"]
    record = {"python": str(python), "assets": str(folder), "source": str(source), "stamp": _stamp(source) or stamp}
    record |= {"opengl": hello["opengl"], "packages": [*PACKAGES, *BARE_PACKAGES], "versions": versions}
    _write(venv / libero_files.RECORD, json.dumps(record | {"stand_ins": hello["stand_ins"]}, indent=1))
    yield f"LIBERO is ready: {', '.join(f'{name} {version}' for name, version in versions.items())}."
    if venv != default_venv():
        yield f"Set FPO_JAX_LIBERO={venv} whenever you use it."


def make_venv(venv: Path, python: Path, record: dict[str, Any]) -> str:
    """Make the virtual environment and install into it, unless that is done; says which. Raises FpoError."""
    if record.get("packages") == [*PACKAGES, *BARE_PACKAGES] and python.exists():
        return f"Virtual environment: {venv} (was there)."
    if venv.is_dir() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        raise FpoError(f"{venv} is a folder with other things in it: choose another --venv.")
    _run("The virtual environment cannot be made", [sys.executable, "-m", "venv", str(venv)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run("LIBERO's dependencies cannot be installed", [*pip, *PACKAGES])
    _run("LIBERO cannot be installed", [*pip, "--no-deps", *BARE_PACKAGES])
    return f"Virtual environment: {venv} (made, {len(PACKAGES) + len(BARE_PACKAGES)} packages and what they need)."


def locate_assets(path: Path) -> Path:
    """The folder of assets in a folder that users give: itself, or in a checkout or a pack. Raises FpoError."""
    for place in _PLACES:
        for folder in [path] if not place else sorted(path.glob(place)):
            if (folder / "scenes").is_dir() and (folder / "textures").is_dir():
                return folder
    raise FpoError(f"{path} holds no LIBERO assets, which have folders scenes and textures: give --assets {_WHERE}.")


def unpack(archive: Path, venv: Path, python: Path, record: dict[str, Any]) -> tuple[Path, str]:
    """(folder with what is in the archive, whether it was there already). Raises FpoError."""
    folder, new = venv / "assets", venv / "assets.new"
    if folder.is_dir() and record.get("source") == str(archive) and _stamp(archive) in (record.get("stamp"), None):
        return folder, "unpacked before"
    shutil.rmtree(new, ignore_errors=True)
    _run(f"{archive.name} cannot be unpacked as .tar.zst", [str(python), "-c", _UNPACK, str(archive), str(new)])
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    return folder, f"unpacked from {archive.name}"


def check_assets(folder: Path) -> str:
    """Compare the assets with their manifest, if they have one, and with what the 130 tasks need; says what was found.

    Raises FpoError for files that are missing or not as the manifest has them.
    """
    needed = Path(__file__).with_name("libero_assets.txt").read_text().splitlines()
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise FpoError(f"{folder} lacks {_some(missing)} of {len(needed)} files that the tasks need: get {_WHERE}.")
    listed = libero_files.manifest(folder)
    if listed is None:
        return f"all {len(needed)} files that LIBERO's 130 tasks need"
    wrong = []
    for row in listed.read_text().splitlines()[1:]:
        name, size, digest, _ = row.split("\t")
        file = folder / name
        if not file.is_file() or file.stat().st_size != int(size) or _sha256(file) != digest:
            wrong.append(name)
    if wrong:
        raise FpoError(f"{folder} differs from its {listed.name} in {_some(wrong)} files: get or unpack it again.")
    stand_ins = libero_files.stand_ins(folder)
    remark = f"; {stand_ins} are stand-ins: results on pictures are not official" if stand_ins else ""
    return f"all as in {listed.name}{remark}"


def try_out(python: Path, assets: Path) -> tuple[dict[str, Any], str]:
    """(hello of a worker, what it did) for one reset, one step and one picture of each camera. Raises FpoError.

    Where no OpenGL library works, without pictures: bases that see object poses need none.
    """
    try:
        hello, images = _play(python, assets, CAMERAS)
    except StartError as error:
        if not error.reason.startswith("render"):
            raise
        hello, _ = _play(python, assets, ())
        return hello, f"one reset, one step and NO PICTURES, so bases with cameras cannot be used ({error.reason})"
    if not all(image.std() > 10 for image in images):
        raise FpoError("LIBERO's pictures show nothing: check the graphics driver, or set MUJOCO_GL=osmesa.")
    seen = f"{len(images)} pictures of {images.shape[1]} x {images.shape[2]} pixels by {hello['opengl']}"
    return hello, f"one reset, one step, {seen}"


def _play(python: Path, assets: Path, cameras: tuple[str, ...]) -> tuple[dict[str, Any], np.ndarray]:
    """(hello of a worker, pictures [cameras, y, x, 3]) of one reset and one step."""
    with worker(python, assets, "libero_spatial", cameras) as pool:
        for submit in (
            lambda: pool.submit_reset(0, Episode(0, 0, init=0, seed=0, test=False)),
            lambda: pool.submit_step(0, np.zeros((1, 7), np.float32)),
        ):
            submit()
            outcome = pool.collect(0)
            if outcome.failed or outcome.arrays is None:
                raise FpoError(f"LIBERO is installed but does not work ({outcome.failed}).")
        return dict(pool.hello), outcome.arrays["images"]


@contextlib.contextmanager
def worker(python: Path, assets: Path, suite: str, cameras: tuple[str, ...] = CAMERAS):
    """A pool whose slot 0 plays this suite's tasks. Raises FpoError."""
    hello = {"assets": str(assets), "image_size": 224, "cameras": list(cameras), "max_chunk": MAX_CHUNK}
    reset = {"suite": suite, "order": "episode"}
    pool = pool_by_any_renderer(WorkerSettings(worker_command(python), hello, reset))
    try:
        yield pool
    finally:
        pool.close()


def _run(complaint: str, command: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode == 0:
            return
        said = done.stdout.strip().splitlines() or [f"exit status {done.returncode}"]
    except OSError as error:
        said = [str(error)]
    reason = next((line for line in reversed(said) if "error" in line.lower()), said[-1])
    raise FpoError(f"{complaint} ({reason.strip()}): mend that, then run this again.")


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stamp(source: Path) -> list[int] | None:
    """Tells an archive from another one under the same name; None for folders."""
    if not source.is_file():
        return None
    stat = source.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _write(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def main(args: Args) -> None:
    for line in set_up(args.assets, args.venv):
        print(line, flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except FpoError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
