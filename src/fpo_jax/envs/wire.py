"""How the training process and a simulator's worker process talk: messages on a socket, arrays in shared memory.

Workers run in other environments of Python and load this file by its path, so it needs the standard library alone
(`views` imports NumPy, which both sides have).
"""

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

MAX_OBJECTS = 32  # poses in the shared memory
ACTION_DIM, PROPRIO_DIM, POSE_DIM = 7, 8, 7

_LENGTHS = struct.Struct("<II")  # bytes of a message's two parts, which follow: a JSON object, raw data
_ALIGNMENT = 64  # [bytes]


class Field(NamedTuple):
    """Where an array lies in the shared memory."""

    dtype: str  # NumPy's name of it
    shape: tuple[int, ...]
    offset: int  # [bytes]


class Layout(NamedTuple):
    """The arrays of a worker's shared memory, and its size [bytes]."""

    fields: dict[str, Field]
    size: int


def layout(image_size: int, cameras: Sequence[str], max_chunk: int) -> Layout:
    """The shared memory of a worker, the same on both sides.

    actions f32 [max_chunk, 7]; proprio f32 [8]; objects f32 [32, 7]: position [m], quaternion wxyz, zeros behind the
    last one; images u8 [cameras, image_size, image_size, 3].
    """
    shapes = {
        "actions": ("float32", (max_chunk, ACTION_DIM)),
        "proprio": ("float32", (PROPRIO_DIM,)),
        "objects": ("float32", (MAX_OBJECTS, POSE_DIM)),
        "images": ("uint8", (len(cameras), image_size, image_size, 3)),
    }
    fields, offset = {}, 0
    for name, (dtype, shape) in shapes.items():
        fields[name] = Field(dtype, shape, offset)
        num_bytes = {"float32": 4, "uint8": 1}[dtype]
        for length in shape:
            num_bytes *= length
        offset += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    return Layout(fields, offset)


def views(memory: Any, plan: Layout) -> dict[str, Any]:
    """NumPy arrays over `memory` (an mmap of `plan.size` bytes), by name; writable where the memory is."""
    import numpy as np

    return {name: np.ndarray(f.shape, f.dtype, memory, f.offset) for name, f in plan.fields.items()}


def send(connection: socket.socket, head: dict[str, Any], body: bytes = b"") -> None:
    """One message. Raises OSError where the other end is gone or, on a socket with a timeout, stuck."""
    text = json.dumps(head).encode()
    connection.sendall(_LENGTHS.pack(len(text), len(body)) + text + body)


def receive(connection: socket.socket) -> tuple[dict[str, Any], bytearray]:
    """The next message. Raises OSError where the other end is gone or, on a socket with a timeout, stuck."""
    head_length, body_length = _LENGTHS.unpack(_exactly(connection, _LENGTHS.size))
    return json.loads(_exactly(connection, head_length)), _exactly(connection, body_length)


def _exactly(connection: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    rest = memoryview(data)
    while rest:
        received = connection.recv_into(rest)
        if received == 0:
            raise ConnectionError("the other end is closed")
        rest = rest[received:]
    return data
