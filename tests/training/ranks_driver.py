"""Runs trainings on several processes, one after the other, in a process of its own: see the fixture ``on_ranks``.

Reads lists of runs, one a line, and answers each with the exit codes. Children are forked, which spares them the
imports. Each is a rank of one run: it has torchrun's environment, may be sabotaged, and then does what the command line
does. Its output goes to files. What takes time and is looked at in other tests is left out: the picture of the loss
curve, and most of the pauses in which a process that fails finds out why.
"""

import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import safetensors.torch  # noqa: F401
import torch
import torch.distributed.checkpoint
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import tyro  # noqa: F401
from diffusers import DDIMScheduler  # noqa: F401

import scalelong_fast.cli
import scalelong_fast.cli.train
import scalelong_fast.training.outputs as outputs
from scalelong_fast.data import load_images
from scalelong_fast.training.watch import Watch

SECONDS = 90
#: Seconds between two looks at the others.
INTERVAL = 0.1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def child(rank: int, port: int, run: dict) -> None:
    world = run["world"]
    logs = Path(run["logs"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(logs / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if world:
        local = run.get("local_world", world)
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_RANK=str(rank % local),
            LOCAL_WORLD_SIZE=str(local),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    code = 70
    try:
        scope = {"rank": rank, "die": lambda: os.kill(os.getpid(), signal.SIGKILL), "module": importlib.import_module}
        exec(run.get("sabotage", ""), scope)
        code = scalelong_fast.cli.main(["train", *run["arguments"]])
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    # All of these import a lot when first used.
    load_images("digits")
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    torch.set_num_threads(1)
    outputs.save_loss_curve = lambda path, rows, title: path.touch()
    begin = Watch.__init__

    def impatient(self, *args: object) -> None:
        begin(self, *args)
        self.interval = INTERVAL

    Watch.__init__ = impatient
    gc.freeze()  # the children collect their own garbage only
    for line in sys.stdin:
        print(json.dumps(endings_of(json.loads(line))), flush=True)


def endings_of(runs: list[dict]) -> list[list[int]]:
    if any("block" in run["arguments"] for run in runs):
        torch.compile(torch.neg, backend="aot_eager")(torch.ones(1, requires_grad=True)).backward()  # imports as well
    endings = []
    for run in runs:
        port, children = free_port(), []
        for rank in range(run["world"] or 1):
            pid = os.fork()
            if pid == 0:
                child(rank, port, run)
            children.append(pid)
        codes: dict[int, int] = {}
        end = time.monotonic() + SECONDS
        while len(codes) < len(children):
            for pid in children:
                if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(done[1])
            if time.monotonic() > end:
                for pid in set(children) - set(codes):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        endings.append([codes[pid] for pid in children])
    return endings


main()
