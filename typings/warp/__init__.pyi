# Warp is installed on machines with an NVIDIA GPU only (extra `warp`).
from typing import Any

def __getattr__(name: str) -> Any: ...
