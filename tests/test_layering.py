"""Who may import whom (docs/architecture.md), read from the source."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "fpo_jax"

# A module imports modules of lower rank, of its own folder, and of its own rank where that is a rank of siblings.
RANKS = [
    {"types", "config"},
    {"flow", "latent", "critic", "networks", "metrics", "hosts", "parallel", "buffer", "demos", "images"}
    | {"health", "signals"},
    {"envs", "policies", "algorithms"},
    {"clone"},
    {"clone_pi0", "rollout"},
    {"train", "evaluate"},
    {"population", "video", "steerability"},
    {"runs"},
    {"fit"},
    {"fit_population"},
]
SIBLINGS = {0, 1, 5}  # environments, policies and algorithms never import each other
# Leaves, with what they may import; only LEAF_USERS and experiments import a leaf.
LEAVES = {
    "checkpoint": {"types", "hosts"},
    "saver": {"checkpoint", "hosts"},
    "analysis": {"types", "config", "latent", "metrics"},
    "provenance": {"types"},
    "sweeps": {"types", "config"},
    "sweep_report": {"types", "metrics", "analysis", "sweeps"},
    "serve": set().union(*RANKS, {"checkpoint"}),
}
LEAF_USERS = {"train", "evaluate", "video", "steerability", "runs", "fit", "fit_population", "serve"}
# Heavy or optional packages: which modules may import them, and these only inside a function.
OPTIONAL = {
    "wandb": {"metrics"},
    "matplotlib": {"analysis", "sweep_report"},
    "imageio": set(),  # it forks
    "imageio_ffmpeg": {"analysis"},
    "PIL": {"analysis", "images", "envs"},
    "sentencepiece": {"policies"},
    "sklearn": {"analysis"},
    "tensorboardX": {"metrics"},
    "websockets": {"serve"},
    "warp": {"envs"},
    "gymnasium": {"envs"},
    "yaml": {"sweeps"},
    "ray": set(),  # experiments/sweep_ray.py
    "optuna": set(),
    "gym_aloha": set(),
    "dm_control": set(),
    "torch": set(),
}

MODULES = {p.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(p.read_text()) for p in PACKAGE.rglob("*.py")}


def imports(tree: ast.Module) -> list[tuple[str, bool]]:
    """(imported module, at module level) of every import statement; `from a import b` counts as a.b."""
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found += [(f"{node.module}.{alias.name}", id(node) not in lazy) for alias in node.names]
    return found


def unit(module: str) -> str:
    """The file or folder of the package that a module belongs to."""
    return module.split("/")[0]


def rank(name: str) -> int:
    return next(i for i, names in enumerate(RANKS) if name in names)


def allowed(importer: str, imported: str) -> bool:
    if importer == imported or importer == "__init__":
        return True
    if importer in LEAVES:
        return imported in LEAVES[importer]
    if imported in LEAVES:
        return importer in LEAF_USERS
    low, high = rank(imported), rank(importer)
    return low < high or (low == high and low in SIBLINGS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    for name, _ in imports(MODULES[module]):
        root, *rest = name.split(".")
        if root != "fpo_jax" or not rest:
            continue
        assert rest[0] in set().union(*RANKS) | set(LEAVES), f"{rest[0]} has no place in RANKS"
        assert allowed(unit(module), rest[0]), f"{module} must not import {name}"


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_lazily_where_they_are_used(module):
    for name, at_module_level in imports(MODULES[module]):
        root = name.split(".")[0]
        unpickles = {"pickle"} if module == "envs/libero_files" else set()  # with a loader that makes arrays only
        assert root not in {"pickle", "dill", "cloudpickle"} - unpickles, f"{module} imports {root}"
        if root in OPTIONAL:
            assert unit(module) in OPTIONAL[root], f"{module} must not import {root}"
            assert not at_module_level, f"{module} imports {root} at module level"


@pytest.mark.parametrize("module", MODULES)
def test_annotations_are_evaluated(module):
    """jaxtyping's checks need real annotations."""
    assert ("__future__.annotations", True) not in imports(MODULES[module])


def test_every_module_has_a_place():
    known = set().union(*RANKS) | set(LEAVES) | {"__init__"}
    assert {unit(m) for m in MODULES} <= known
    assert not known & set(sys.stdlib_module_names) - {"types"}
