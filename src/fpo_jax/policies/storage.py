"""Where checkpoints and tokenizers lie, local or in a bucket, and what goes wrong when they are read."""

import contextlib
import logging
import os
from collections.abc import Iterator

from etils import epath

from fpo_jax.types import FpoError

_SCHEMES = ("gs", "s3", "az", "hf")  # of the URLs that etils.epath reads


def openpi_cache() -> epath.Path:
    """openpi's download cache: `$OPENPI_DATA_HOME`, by default ~/.cache/openpi, then bucket and path."""
    return epath.Path(os.environ.get("OPENPI_DATA_HOME") or "~/.cache/openpi").expanduser().resolve()


def locate(url_or_path: str | os.PathLike[str]) -> epath.Path:
    """The absolute path, or a URL's copy in openpi's download cache where there is one, else the URL.

    The cache is `$OPENPI_DATA_HOME` (default ~/.cache/openpi)/bucket/path. A copy of only the weights or only the
    statistics doesn't count as a checkpoint's.
    """
    text = os.fspath(url_or_path).rstrip("/")
    if not text:
        raise FpoError("This configuration has no public weights: give the directory of a checkpoint (--checkpoint).")
    scheme, separator, rest = text.partition("://")
    if not separator:
        return epath.Path(text).expanduser().resolve()
    if scheme not in _SCHEMES:
        raise FpoError(f"{text} can't be read: give a local directory or a bucket URL such as gs://bucket/path.")
    cached = openpi_cache() / rest
    whole = cached.is_dir() and (cached / "params").is_dir() == (cached / "assets").is_dir()
    return cached if whole else epath.Path(text)


def is_remote(path: epath.Path) -> bool:
    return "://" in os.fspath(path)


def names_in(path: epath.Path) -> set[str]:
    """Names in a directory; {} where there is none."""
    with plain_errors(path):
        try:
            return {child.name for child in path.iterdir()}
        except (FileNotFoundError, NotADirectoryError):
            return set()


def children_of(path: epath.Path) -> set[str]:
    """Names in a local directory, for suggestions; {} elsewhere."""
    with contextlib.suppress(OSError):
        return set() if is_remote(path) else {child.name for child in path.iterdir()}
    return set()


@contextlib.contextmanager
def quiet_client() -> Iterator[None]:
    """gcsfs logs the traceback of what it raises: not within."""
    client = logging.getLogger("gcsfs")
    level = client.level
    client.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        client.setLevel(level)


@contextlib.contextmanager
def plain_errors(place: epath.Path) -> Iterator[None]:
    """Says in one sentence what Orbax, TensorStore or the bucket's client raise while they read `place`."""
    try:
        with quiet_client():
            yield
    except FpoError:
        raise
    except Exception as error:  # each of the three has kinds of its own
        if sentence := _sentence(place, error):
            raise FpoError(sentence) from error
        raise


def _sentence(place: epath.Path, error: BaseException | None) -> str:
    """What is wrong and what to do, or '' where it is a bug."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    text = " ".join(f"{type(e).__name__}: {e}" for e in chain)

    def says(*words: str) -> bool:
        return any(word in text for word in words)

    if any(isinstance(e, MemoryError) for e in chain) or says("RESOURCE_EXHAUSTED"):
        return f"The weights of {place} don't fit into memory: use dtype=bfloat16, or share them between devices."
    if any(isinstance(e, PermissionError) for e in chain):
        return f"{place} may not be read by this user: change its permissions, or copy it."
    if is_remote(place):
        if any(isinstance(e, ImportError) for e in chain):
            return (
                f"Reading {place} needs the package gcsfs: install it with pip install 'fpo_jax[gcs]', or download the "
                "directory and give its path."
            )
        codes = {getattr(e, "code", None) for e in chain}
        if codes & {401, 403} or says(
            "Forbidden", "PERMISSION_DENIED", "UNAUTHENTICATED", "RefreshError", "DefaultCredentialsError"
        ):
            return f"Access to {place} was refused: check the address, or log in with gcloud auth login --update-adc."
        network = any(isinstance(e, OSError) and not isinstance(e, FileNotFoundError) for e in chain)
        if network or codes & {500, 502, 503} or says("UNAVAILABLE", "DEADLINE_EXCEEDED", "TransportError"):
            return f"{place} can't be reached: check the network, or download it elsewhere and give its path."
    if not any(isinstance(e, (ValueError, OSError, KeyError)) for e in chain):
        return ""
    return f"{place} is damaged or was not written to its end: copy or download the checkpoint again."
