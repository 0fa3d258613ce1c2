"""Operations and exchanged bytes of one device, counted from the text of a compiled program.

XLA's own `cost_analysis` counts the body of a loop once; here it counts as often as it runs. Bytes are those that a
device receives when n devices pass parts around a ring: (n-1)/n of the result of an all-gather or an all-to-all, twice
that of an all-reduce.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

_BYTES = {"pred": 1, "bf16": 2, "f8e4m3fn": 1}  # the others say their bits
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Counts(NamedTuple):
    """Of one device, in one run of the program."""

    flops: float  # of matrix products and convolutions, 2 per multiply and add
    received: Counter  # kind of collective -> bytes
    collectives: Counter  # kind of collective -> how often

    @property
    def bytes(self) -> float:
        return float(sum(self.received.values()))


def _arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(type, shape) of every array in a type such as `(f32[2,3]{1,0}, s32[])`."""
    found = _ARRAY.findall(text)
    return [(kind, tuple(map(int, shape.split(","))) if shape else ()) for kind, shape in found]


def _size(text: str) -> int:
    """Bytes of a type."""

    def width(kind: str) -> int:
        return _BYTES.get(kind) or max(int(re.sub(r"\D", "", kind) or 8) // 8, 1)

    return sum(width(kind) * math.prod(shape) for kind, shape in _arrays(text))


def _numbers(attribute: str, rest: str) -> list[int]:
    match = re.search(attribute + r"=\{([\d,]*)\}", rest)
    return [int(i) for i in match[1].split(",") if i] if match else []


def _group_size(rest: str, devices: int) -> int:
    """Devices that take part in a collective together."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(match[1].split(","))
    return devices


def _received(kind: str, result: str, operands: float, rest: str, devices: int) -> float:
    size = _size(result)
    if kind == "collective-permute":
        return size
    group = _group_size(rest, devices)
    share = (group - 1) / group
    return {"all-gather": size, "all-to-all": size, "all-reduce": 2 * size, "reduce-scatter": operands}[kind] * share


def _flops(kind: str, result: str, operands: list[str], rest: str) -> float:
    """Of one instruction; `operands`: their types."""
    out = math.prod(_arrays(result)[0][1])
    if kind == "dot":
        left = _arrays(operands[0])[0][1]
        return 2.0 * out * math.prod(left[i] for i in _numbers("lhs_contracting_dims", rest))
    kernel = _arrays(operands[1])[0][1]
    labels = re.search(r"dim_labels=\w+_(\w+)->", rest)
    assert labels is not None
    return 2.0 * out * math.prod(kernel) / kernel[labels[1].index("o")]


def count(text: str, devices: int) -> Counts:
    """The counts of a program (`compiled.as_text()`) that runs on so many devices."""
    bodies: dict[str, list[tuple[str, str, str, str]]] = {}
    entry = name = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line.strip()):
            name = match[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif match := _INSTRUCTION.match(line.strip()):
            bodies[name].append((match[1], match[2], match[3], match[4]))
    known: dict[str, Counts] = {}

    def of(computation: str) -> Counts:
        if computation not in known:
            known[computation] = _sum(bodies[computation])
        return known[computation]

    def _sum(body: list[tuple[str, str, str, str]]) -> Counts:
        types = {name: result for name, result, _, _ in body}
        flops, received, times = 0.0, Counter(), Counter()
        for _, result, kind, rest in body:
            operands = [types.get(word, "") for word in re.findall(r"%([\w.\-]+)", rest.split("), ")[0])]
            plain = kind.removesuffix("-start")
            if plain in _COLLECTIVES:
                parts = _arrays(result)
                whole = result if kind == plain else f"{parts[-1][0]}[{','.join(map(str, parts[-1][1]))}]"
                received[plain] += round(_received(plain, whole, sum(map(_size, operands)), rest, devices))
                times[plain] += 1
            elif kind in ("dot", "convolution"):
                flops += _flops(kind, result, operands, rest)
            for called, often in _calls(kind, rest):
                inner = of(called)
                flops += often * inner.flops
                received.update({k: often * v for k, v in inner.received.items()})
                times.update({k: often * v for k, v in inner.collectives.items()})
        return Counts(flops, received, times)

    return of(entry)


def _calls(kind: str, rest: str) -> list[tuple[str, int]]:
    """(computation, how often) that an instruction runs; the reductions of a collective are no work of their own."""
    if kind == "while":
        trips = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
        assert trips is not None, "a loop of unknown length"
        body = re.search(r"body=%?([\w.\-]+)", rest)
        assert body is not None
        return [(body[1], int(trips[1]))]
    if kind in ("fusion", "call"):
        return [(name, 1) for name in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", rest)]
    if kind == "conditional":
        return [(name, 1) for name in re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)]
    return []
