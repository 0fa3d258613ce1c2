"""Frozen base policies (`fpo_jax.types.BasePolicy`) and how to load one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fpo_jax.config import OpenpiOptions
from fpo_jax.policies.openpi import open_openpi
from fpo_jax.policies.openpi_configs import OPENPI_CONFIGS, read_openpi_config
from fpo_jax.policies.point_mass import PointMassPolicy
from fpo_jax.policies.small import load_policy
from fpo_jax.types import BasePolicy, FpoError, Params, suggestion

CHECKPOINTS = Path(__file__).resolve().parents[3] / "checkpoints"  # of a source checkout (pip install -e)
ANALYTIC = {"point_mass": PointMassPolicy}  # bases that need no file
SHIPPED = {"libero_90/LIVING_ROOM_SCENE3_pick_up_the_butter_and_put_it_in_the_tray": "libero_butter"}  # env -> its base
OPENPI_FILE = "openpi.json"  # in a folder of ours: an openpi configuration, with params/ and assets/ beside it


def load_base(
    name_or_dir: str | Path,
    checkpoints_root: str | Path | None = None,
    checkpoint: str | None = None,
    options: OpenpiOptions | None = None,
) -> tuple[BasePolicy, Params]:
    """Loads a frozen base as (policy, params); see `open_base`."""
    policy, load = open_base(name_or_dir, checkpoints_root, checkpoint, options)
    return policy, load()


def open_base(
    name_or_dir: str | Path,
    checkpoints_root: str | Path | None = None,
    checkpoint: str | None = None,
    options: OpenpiOptions | None = None,
) -> tuple[BasePolicy, Callable[[], Params]]:
    """(policy, what loads its params): a large base can be checked against its environment before it is read.

    `name_or_dir`: a name in `checkpoints_root`, `point_mass`, a folder, a named openpi configuration, or a JSON file
    that holds one; `checkpoint` (directory or bucket URL) and `options` are for openpi's. Raises FpoError.
    """
    root = Path(CHECKPOINTS if checkpoints_root is None else checkpoints_root)
    name = SHIPPED.get(str(name_or_dir), str(name_or_dir))
    config = OPENPI_CONFIGS.get(name)
    if name.endswith(".json"):
        config = read_openpi_config(name)
    folder = root / name if (root / name).is_dir() else Path(name)
    if (folder / OPENPI_FILE).is_file():
        config = replace(read_openpi_config(folder / OPENPI_FILE), checkpoint=str(folder))
    if config is not None:
        return open_openpi(config, checkpoint, options)
    if "://" in name or (folder / "params").is_dir() or (folder / "_METADATA").is_file():
        raise FpoError(
            f"{name} holds weights, and nothing in them says which model they are of: name its configuration beside "
            f"it, as in --base pi0_aloha_sim --checkpoint {name}."
        )
    if checkpoint is not None:
        raise FpoError(f"--checkpoint belongs to openpi bases, and {name!r} is none{suggestion(name, OPENPI_CONFIGS)}")
    if name in ANALYTIC:
        return ANALYTIC[name](), ANALYTIC[name]().init
    if folder.is_dir() or "/" in name or isinstance(name_or_dir, Path):
        policy, params = load_policy(folder)
        return policy, lambda: params
    shipped = (file.parent.name for kind in ("config.json", OPENPI_FILE) for file in root.glob(f"*/{kind}"))
    known = [*sorted({*ANALYTIC, *shipped}), *OPENPI_CONFIGS]
    raise FpoError(f"There is no base policy called '{name}' in {root}{suggestion(name, known)}")
