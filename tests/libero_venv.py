"""For tests that need LIBERO: its virtual environment, a worker, and scripts that run beside it."""

import json
import mmap
import os
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fpo_jax
from fpo_jax.envs import libero_setup, wire
from fpo_jax.types import FpoError

ENVS = Path(fpo_jax.__file__).parent / "envs"


def installed() -> tuple[Path, Path]:
    """(Python, assets) of LIBERO; without them the test that asks is skipped."""
    try:
        return libero_setup.find()
    except FpoError as error:
        pytest.skip(str(error))


class Client:
    """A worker process, asked directly: what `workers.py` makes of its answers is tested elsewhere."""

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None):
        self.connection, theirs = socket.socketpair()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | (environment or {})
        with theirs:
            self.process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
            )
        self.connection.settimeout(300)

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Its answer; OSError where it ended."""
        wire.send(self.connection, {"op": op, **fields})
        return wire.receive(self.connection)[0]

    def hello(self, assets: Path, cameras: Sequence[str] = ("image", "wrist_image"), **fields: Any) -> dict[str, Any]:
        """Says hello, with memory that both map: `arrays`."""
        plan = wire.layout(224, cameras, 50)
        with tempfile.NamedTemporaryFile() as file:
            file.truncate(plan.size)
            self.arrays = wire.views(mmap.mmap(file.fileno(), plan.size), plan)
            request = {"memory": file.name, "slots": plan.fields, "cameras": list(cameras), "assets": str(assets)}
            return self.ask("hello", **(request | fields))

    def reset(self, suite: str, task: int, init: int | None, seed: int = 0, order: str = "episode") -> dict[str, Any]:
        return self.ask("reset", suite=suite, task=task, init=init, seed=seed, order=order)

    def step(self, actions: np.ndarray) -> dict[str, Any]:
        self.arrays["actions"][: len(actions)] = actions
        return self.ask("step", length=len(actions))

    def seen(self) -> dict[str, np.ndarray]:
        """A copy of what it wrote."""
        return {name: array.copy() for name, array in self.arrays.items() if name != "actions"}

    def close(self) -> None:
        self.connection.close()
        try:
            self.process.wait(300)  # it ends when the connection does
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def run_script(python: Path, script: str, *arguments: str) -> str:
    """What a script printed that runs in LIBERO's virtual environment, where `load` gives files of envs by name."""
    load = f"""
import importlib.util, sys
def load(name):
    spec = importlib.util.spec_from_file_location(name, {str(ENVS)!r} + "/" + name + ".py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), "-P", "-c", load + script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def last_json(output: str) -> Any:
    """The last line of what a script printed: robosuite prints too."""
    return json.loads(output.strip().splitlines()[-1])
