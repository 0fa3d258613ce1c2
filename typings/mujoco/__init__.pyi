# MuJoCo's names come from a compiled module without stubs, so the type checker cannot see them.
from typing import Any

def __getattr__(name: str) -> Any: ...
