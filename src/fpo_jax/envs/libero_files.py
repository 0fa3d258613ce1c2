"""LIBERO's own files, read without LIBERO: its tasks, their prompts and their initial states.

Its worker, which has no fpo_jax, loads this file by its path, so it needs the standard library and NumPy alone.
LIBERO's own readers import torch, and unpickle whatever a file holds.
"""

import ast
import contextlib
import json
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
CONFIG = "libero_config"  # folder in LIBERO's virtual environment with the config.yaml that its import insists on
RECORD = "fpo_jax_libero.json"  # file there: what `libero_setup` did


class Task(NamedTuple):
    """One of the 130 tasks."""

    name: str  # of its files
    prompt: str  # what openpi and OpenVLA were trained on
    language: str  # the sentence in its BDDL file, which is not always the same
    inits: int  # official initial states
    objects: tuple[str, ...]  # those whose poses are observed, in their order
    goal: str  # (predicate argument ...), as the BDDL file has it


def prompt(name: str) -> str:
    """A task's prompt from its file name: the words behind the scene, as LIBERO's benchmark makes it."""
    return re.sub(r"^[A-Z_]+_SCENE\d+_", "", name).replace("_", " ")


def language(bddl: str) -> str:
    """The sentence in the text of a BDDL file, "" where it has none."""
    found = re.search(r"\(:language\s+([^)]*)\)", bddl)
    return " ".join(found[1].split()) if found else ""


def objects(bddl: str) -> tuple[str, ...]:
    """The movable things in the text of a BDDL file, in the order in which LIBERO makes them."""
    found = re.search(r"\(:objects\s+([^)]*)\)", bddl)
    return tuple(re.sub(r"\s-\s+\S+", " ", found[1]).split()) if found else ()


def goal(bddl: str) -> str:
    """The predicates of the goal in the text of a BDDL file, "" where it has none."""
    found = re.search(r"\(:goal\s+\(And\s+((?:\([^()]*\)\s*)+)\)", bddl, re.IGNORECASE)
    return " ".join(found[1].split()) if found else ""


def task_names(root: Path) -> dict[str, list[str]]:
    """The tasks of each suite, in their official order; `root` is the folder libero/libero of the package."""
    module = ast.parse((root / "benchmark" / "libero_suite_task_map.py").read_text())
    for node in module.body:
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["libero_task_map"]:
            names = ast.literal_eval(node.value)
            return {suite: list(names[suite]) for suite in SUITES}
    raise ValueError("libero_suite_task_map.py has no libero_task_map")


def tasks(root: Path) -> dict[str, list[Task]]:
    """All tasks, by suite. Raises OSError and ValueError for files that are not LIBERO's."""

    def task(suite: str, name: str) -> Task:
        bddl = bddl_file(root, suite, name).read_text()
        return Task(name, prompt(name), language(bddl), len(inits(root, suite, name)), objects(bddl), goal(bddl))

    return {suite: [task(suite, name) for name in names] for suite, names in task_names(root).items()}


def bddl_file(root: Path, suite: str, name: str) -> Path:
    """Where a task is defined."""
    return root / "bddl_files" / suite / f"{name}.bddl"


def write_config(folder: Path, root: Path, assets: str) -> None:
    """Write LIBERO's config.yaml unless it is right already: without one, its import asks at the terminal.

    Raises OSError where there is none and the folder cannot be written to.
    """
    places = {"assets": assets, "bddl_files": "bddl_files", "benchmark_root": "", "datasets": "datasets"}
    places["init_states"] = "init_files"
    text = json.dumps({name: str(root / place) for name, place in places.items()}, indent=1)  # which is YAML too
    path = folder / "config.yaml"
    if path.exists() and path.read_text() == text:
        return
    new = folder / f"config.yaml.{os.getpid()}"
    try:
        folder.mkdir(exist_ok=True)
        new.write_text(text)
        new.replace(path)  # other workers may be reading it
    except OSError:
        if not path.exists():
            raise


def manifest(assets: Path) -> Path | None:
    """The list of files (path, bytes, sha256, origin) that comes with some packs of assets."""
    return next((path for path in (assets / "MANIFEST.tsv", assets.parent / "MANIFEST.tsv") if path.exists()), None)


def stand_ins(assets: Path) -> int:
    """How many of the assets are not LIBERO's own by their manifest: pictures of them are not official."""
    with contextlib.suppress(OSError):
        listed = manifest(assets)
        rows = listed.read_text().splitlines()[1:] if listed else []
        return sum(row.split("\t")[-1] == "stand-in" for row in rows)
    return 0


def inits(root: Path, suite: str, name: str) -> np.ndarray:
    """A task's official initial states, float64 [states, 1 + nq + nv]: time [s], positions, velocities."""
    return read_inits(root / "init_files" / suite / f"{name}.pruned_init")


def read_inits(path: Path) -> np.ndarray:
    """The array in a file that torch.save wrote: a zip with a pickle, of which only arrays are accepted.

    Raises ValueError for a file that holds anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (member,) = [name for name in archive.namelist() if name.rsplit("/", 1)[-1] == "data.pkl"]
            with archive.open(member) as file:
                states = _ArrayUnpickler(file).load()
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} is no file of initial states: {error}") from None
    if not isinstance(states, np.ndarray) or states.dtype != np.float64 or states.ndim != 2:
        raise ValueError(f"{path.name} is no file of initial states: it holds no table of float64")
    if not np.isfinite(states).all():
        raise ValueError(f"{path.name} has initial states that are not finite")
    return states


def _latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 of pickle, which has no bytes, writes them."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Makes NumPy arrays and nothing else: a pickle can otherwise run any program."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
            ("_codecs", "encode"): _latin1,
        }
        wanted = (module.replace("numpy.core", "numpy._core"), name)  # as NumPy 2 calls it
        if wanted not in allowed:
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return allowed[wanted]


def _reconstruct(cls: type, shape: tuple[int, ...], kind: bytes) -> np.ndarray:
    """An array that is yet to be filled, as NumPy's function of this name."""
    if cls is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError("an array that is none")
    return np.empty(shape, kind.decode("latin1"))
