"""What a result was made with: versions, source revision, devices, and the numbers of the frozen base."""

import importlib.metadata
import json
import os
import platform
import subprocess
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fpo_jax.types import Params


def provenance() -> dict[str, Any]:
    """Versions, git revision and machine, for the record."""
    names = ("fpo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "mujoco", "mujoco-mjx", "numpy")
    return {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "python": platform.python_version(),
        "git_revision": git_revision(),
        "devices": [str(device) for device in jax.devices()],
    }


def git_revision() -> str | None:
    """The commit of the source tree this package runs from ("-dirty" where it was changed); None outside of one."""
    package = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=package, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        inside = Path(git("rev-parse", "--show-toplevel")) == package.parents[1]
        return git("describe", "--always", "--dirty", "--abbrev=12") if inside else None
    except (OSError, subprocess.CalledProcessError):
        return None


def tree_crc32(tree: Params) -> int:
    """CRC-32 over the bytes of all leaves, to tell whether two trees hold the same numbers."""
    crc = 0
    for leaf in jax.tree.leaves(tree):
        # In parts, which are forgotten at once: one leaf of a full-size π0 has more than 2 GB, and a device array
        # keeps its copy on the host.
        for part in leaf if leaf.ndim > 1 else [leaf]:
            crc = zlib.crc32(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data, crc)
    return crc


def write_provenance(run_dir: Path, base_crc32: int, protocol: dict[str, Any] | None) -> None:
    """What this start runs on, after those before it, the environment's protocol and the checksum of the base."""
    path = run_dir / "provenance.json"
    starts = json.loads(path.read_text())["starts"] if path.exists() else []
    this = provenance() | ({} if protocol is None else {"protocol": protocol})
    write_json(path, {"base_crc32": base_crc32, "starts": [*starts, this]})


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all, on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".partial")
    with partial_path.open("w") as stream:
        stream.write(json.dumps(content, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial_path.replace(path)
