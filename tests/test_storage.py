"""Where checkpoints lie: local places, openpi's cache, buckets."""

import json
import os
import shutil
import threading
import urllib.parse
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from etils.epath import backend

from fpo_jax.policies.openpi_checkpoint import load_norm_stats, restore_params, save_params
from fpo_jax.policies.storage import locate, plain_errors
from fpo_jax.types import FpoError
from openpi_checkpoints import (  # noqa: F401 (fixtures)
    STATS,
    assert_same,
    no_cache,
    saved,
    small_tree,
    structs,
)

# --- where things are -----------------------------------------------------------------------------------------------


def test_locate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert os.fspath(locate("some/where/")) == str(tmp_path / "some/where")
    assert os.fspath(locate("~/x")) == os.path.expanduser("~/x")
    url, cached = "gs://bucket/checkpoints/pi0", tmp_path / "cache/bucket/checkpoints/pi0"
    assert os.fspath(locate(url)) == url
    (cached / "params").mkdir(parents=True)  # openpi's training downloads no more
    assert os.fspath(locate(url)) == url
    assert os.fspath(locate(f"{url}/params/")) == str(cached / "params")
    (cached / "assets").mkdir()
    assert os.fspath(locate(url)) == str(cached)
    monkeypatch.delenv("OPENPI_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.move(tmp_path / "cache", tmp_path / ".cache" / "openpi")
    assert os.fspath(locate(url)) == str(tmp_path / ".cache/openpi/bucket/checkpoints/pi0")


@pytest.mark.parametrize(
    ("place", "message"), [("", "has no public weights"), ("https://x/y", "can't be read: give a")]
)
def test_places_that_are_none(place, message):
    with pytest.raises(FpoError, match=message):
        locate(place)


def test_halves_of_a_cached_download_are_used(saved, tmp_path):
    shutil.copytree(saved / "params", tmp_path / "cache/bucket/a/params")
    shutil.copytree(saved / "assets", tmp_path / "cache/bucket/b/assets")
    assert_same(restore_params("gs://bucket/a", structs(small_tree())), small_tree())
    assert load_norm_stats("gs://bucket/b", "some/robot")["state"].mean.shape == (3,)


# --- buckets --------------------------------------------------------------------------------------------------------


class Bucket(BaseHTTPRequestHandler):
    """As much of Google's storage protocol as reading needs: list a folder, describe an object, send (part of) it."""

    root = Path()
    denied = "-"  # objects with this in their name are not for us

    def do_GET(self) -> None:
        url = urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        name = urllib.parse.unquote(url.path.partition("/o/")[2])
        file = self.root / name
        if self.denied in name:
            self.reply(403, {"error": {"code": 403, "message": "no storage.objects.get access"}})
        elif url.path.endswith("/o"):
            folder = query.get("prefix", "").rpartition("/")[0]
            depth = "*" if query.get("delimiter") else "**/*"
            found = [path for path in (self.root / folder).glob(depth) if str(path) > str(self.root / query["prefix"])]
            prefixes = [f"{path.relative_to(self.root).as_posix()}/" for path in found if path.is_dir()]
            files = [self.describe(path) for path in found if path.is_file()]
            self.reply(200, {"items": files, "prefixes": prefixes if depth == "*" else []})
        elif not file.is_file():
            self.reply(404, {"error": {"code": 404, "message": "No such object"}})
        elif query.get("alt") == "media":
            content = file.read_bytes()
            first, last = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")
            start, stop = int(first), int(last or len(content) - 1) + 1
            self.reply(206 if "Range" in self.headers else 200, content[start:stop], start, len(content))
        else:
            self.reply(200, self.describe(file))

    def describe(self, file: Path) -> dict:
        time = "2026-01-01T00:00:00Z"
        facts = {"name": file.relative_to(self.root).as_posix(), "size": str(file.stat().st_size), "generation": "1"}
        return facts | {"bucket": "bucket", "metageneration": "1", "updated": time, "timeCreated": time}

    def reply(self, status: int, content: bytes | dict, start: int = 0, total: int = 0) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{total}")
        self.send_header("x-goog-generation", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def served(root: Path, monkeypatch: pytest.MonkeyPatch, denied: str = "-"):
    """The folder as gs://bucket."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Bucket,), {"root": root, "denied": denied}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)  # gcsfs
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
    type(backend.fsspec_backend)._get_filesystem.cache_clear()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        type(backend.fsspec_backend)._get_filesystem.cache_clear()


def test_straight_from_a_bucket(saved, monkeypatch):
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs, of the extra gcs, is not installed")
    gcsfs.GCSFileSystem.clear_instance_cache()
    with served(saved.parent, monkeypatch):
        assert_same(restore_params("gs://bucket/saved", structs(small_tree())), small_tree())
        assert_same(restore_params("gs://bucket/saved/params", structs(small_tree())), small_tree())
        assert load_norm_stats("gs://bucket/saved/", "some/robot")["state"].mean.shape == (3,)
        with pytest.raises(FpoError, match=r"^gs://bucket/saved has no .*'other': choose one of some/robot\.$"):
            load_norm_stats("gs://bucket/saved", "other")
        with pytest.raises(FpoError, match=r"^There is no checkpoint at gs://bucket/save: give"):
            restore_params("gs://bucket/save", structs(small_tree()))


@pytest.mark.parametrize("denied", ["_METADATA", "manifest.ocdbt"])
def test_bucket_that_refuses(tmp_path, monkeypatch, denied):
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs, of the extra gcs, is not installed")
    gcsfs.GCSFileSystem.clear_instance_cache()
    tree = {"x": jnp.ones(4)}  # one leaf: where several fail, Orbax's threads complain about each other
    save_params(tmp_path / "saved", tree, STATS, "robot")
    with (
        served(tmp_path, monkeypatch, denied),
        pytest.raises(FpoError, match=r"^Access to gs://bucket/saved/params was refused: check the address, or log"),
    ):
        restore_params("gs://bucket/saved", structs(tree))


class HttpError(Exception):
    """As gcsfs' own."""

    def __init__(self, code: int):
        self.code = code


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("Install gcsfs to access Google Storage"), r"needs the package gcsfs: .*'fpo_jax\[gcs\]'"),
        (ConnectionError("Cannot connect to host storage.googleapis.com:443"), "can't be reached: check the network"),
        (HttpError(503), "can't be reached: check the network"),
        (TimeoutError(), "can't be reached: check the network"),
        (HttpError(401), "Access to gs://bucket/pi0 was refused: check the address, or log in"),
        (OSError("Forbidden: https://storage.googleapis.com/"), "Access to gs://bucket/pi0 was refused"),
        (FileNotFoundError("bucket/pi0"), "There is no checkpoint at gs://bucket/pi0"),
    ],
)
@pytest.mark.parametrize("load", [lambda url: restore_params(url, {}), lambda url: load_norm_stats(url, "trossen")])
def test_bucket_out_of_reach(monkeypatch, error, message, load):
    def fail(*_):
        raise error

    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", fail)
    with pytest.raises(FpoError, match=message) as raised:
        load("gs://bucket/pi0")
    assert "\n" not in str(raised.value)


def test_a_bug_stays_a_bug(saved, monkeypatch):
    def fail(*_, **__):
        raise AttributeError("typing error")

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", fail)
    with pytest.raises(AttributeError, match="typing error"):
        restore_params(saved, structs(small_tree()))


def test_bucket_lost_while_reading(monkeypatch):
    error = ValueError("UNAVAILABLE: CURL error Couldn't resolve host name")
    place = locate("gs://bucket/pi0")
    with pytest.raises(FpoError, match="can't be reached"), plain_errors(place):
        raise error
