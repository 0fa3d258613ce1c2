"""A worker process as LIBERO's, with a point in the plane for physics, that breaks when it is told to.

The standard library alone: it starts in 30 ms. `python fake_worker.py <wire.py>` with the socket as standard input;
the environment variable FAKE_WORKER holds JSON:
    faults          {kind, or step:kind, or reset:kind: share of the requests that it hits}; the episode decides which
    log             directory for one file per process: a JSON object per request
    step_seconds    how long a step takes
    meet            directory: during a step there is `<pid>.step` in it, and the step lasts until somebody removes that
                    file, or makes `alone`
    fail_hello      the `failed` of hello
    fail_drawing    the `failed` of a hello with cameras
    opengl          `opengl` of every process, by default fake
    opengl_after    [directory, name]: `opengl` of all but the first process that makes `first` in that directory
    die_once        directory: the process that is the first to make `died` in it dies at its first reset
"""

import array
import contextlib
import importlib.util
import json
import math
import mmap
import os
import random
import signal
import socket
import sys
import time

TASKS = {
    "libero_spatial": ["reach the red goal", "reach the blue goal", "reach the green goal"],
    "libero_90": ["KITCHEN_SCENE1_open_the_drawer", "KITCHEN_SCENE2_close_the_drawer"],
}
STEP, RADIUS = 0.25, 0.3
OPTIONS = json.loads(os.environ.get("FAKE_WORKER", "{}"))


def load_wire(path):
    spec = importlib.util.spec_from_file_location("wire", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def log(**entry):
    if "log" in OPTIONS:
        with open(os.path.join(OPTIONS["log"], f"{os.getpid()}.jsonl"), "a") as file:
            file.write(json.dumps(entry) + "\n")


def first_to_make(path):
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def meet(directory):
    mine = os.path.join(directory, f"{os.getpid()}.step")
    open(mine, "x").close()
    while os.path.exists(mine) and not os.path.exists(os.path.join(directory, "alone")):
        time.sleep(0.001)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(mine)


class FakeWorker:
    def __init__(self, wire):
        self.wire, self.arrays, self.resets = wire, {}, 0

    def hello(self, request):
        plan = self.wire.layout(request["image_size"], request["cameras"], request["max_chunk"])
        with open(request["memory"], "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), plan.size)
        for name, field in plan.fields.items():
            size = math.prod(field.shape)
            view = memoryview(self.memory)[field.offset : field.offset + size * (4 if field.dtype == "float32" else 1)]
            self.arrays[name] = view.cast("f") if field.dtype == "float32" else view
        self.cameras, self.pixels = request["cameras"], request["image_size"] ** 2 * 3
        failed = OPTIONS.get("fail_hello", "") or (OPTIONS.get("fail_drawing", "") if self.cameras else "")
        directory, later = OPTIONS.get("opengl_after", (None, ""))
        is_first = directory is None or first_to_make(os.path.join(directory, "first"))
        opengl = OPTIONS.get("opengl", "fake") if is_first else later
        return {"failed": failed, "opengl": opengl, "pid": os.getpid(), "versions": {"fake": "1"}, "wait_steps": 10}

    def tasks(self, request):
        return {
            "suites": {
                suite: [{"name": n.replace(" ", "_"), "prompt": n.replace("_", " "), "inits": 50} for n in names]
                for suite, names in TASKS.items()
            }
        }

    def reset(self, request):
        self.episode = [request["suite"], request["task"], request["init"], request["seed"]]
        self.steps, self.position = 0, [0.0, 0.0]
        self.resets += 1
        marker = OPTIONS.get("die_once")
        if marker and self.resets == 1 and first_to_make(os.path.join(marker, "died")):
            os._exit(7)
        angle = random.Random(json.dumps(self.episode)).uniform(0, 2 * math.pi)
        self.goal = [math.cos(angle), math.sin(angle)]
        return self.maybe_break("reset") or self.show() | {"success": False}

    def step(self, request):
        if OPTIONS.get("step_seconds"):
            time.sleep(OPTIONS["step_seconds"])
        if "meet" in OPTIONS:
            meet(OPTIONS["meet"])
        broken = self.maybe_break("step")
        if broken:
            return broken
        executed, success = 0, False
        while executed < request["length"] and not success:
            action = self.arrays["actions"][7 * executed : 7 * executed + 2]
            for i in range(2):
                self.position[i] += STEP * max(-1.0, min(1.0, action[i]))
            executed += 1
            success = math.dist(self.position, self.goal) < RADIUS
        self.steps += executed
        return self.show() | {"steps": executed, "success": success}

    def show(self):
        self.arrays["proprio"][:2] = memoryview(_floats(self.position))
        self.arrays["objects"][:7] = memoryview(_floats([*self.goal, 0.0, 1.0, 0.0, 0.0, 0.0]))
        for i in range(len(self.cameras)):
            content = random.Random(f"{self.episode} {self.steps} {i}").randbytes(48)
            self.arrays["images"][i * self.pixels : (i + 1) * self.pixels] = (content * (self.pixels // 48 + 1))[
                : self.pixels
            ]
        return {"failed": ""}

    def maybe_break(self, op):
        """The same episode always breaks at the same request and in the same way."""
        dice = random.Random(f"{self.episode} {self.steps} {op}").random()
        for kind, share in OPTIONS.get("faults", {}).items():
            only, _, kind = kind.rpartition(":")
            dice -= share if only in ("", op) else 0
            if dice < 0:
                log(broke=kind, op=op, episode=self.episode)
                return self.break_down(kind)
        return None

    def break_down(self, kind):
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            while True:
                time.sleep(1000)
        if kind == "nan":
            self.show()
            self.arrays["proprio"][1] = math.nan
            return {"failed": "", "steps": 1, "success": True}
        if kind == "garbage":
            return {"failed": "", "nothing": "of use"}
        return {"failed": f"{kind}: told to fail"}  # render, physics


def _floats(values):
    return array.array("f", values)


def main():
    wire = load_wire(sys.argv[1])
    connection = socket.socket(fileno=0)
    worker = FakeWorker(wire)
    while True:
        request, _ = wire.receive(connection)
        if request["op"] == "close":
            return
        began = time.monotonic()
        answer = {"failed": ""} | getattr(worker, request["op"])(request)
        log(
            op=request["op"],
            episode=getattr(worker, "episode", None),
            steps=getattr(worker, "steps", None),
            began=began,
            ended=time.monotonic(),
            success=answer.get("success"),
        )
        wire.send(connection, answer)


if __name__ == "__main__":
    with contextlib.suppress(OSError):  # the other end has closed
        main()
