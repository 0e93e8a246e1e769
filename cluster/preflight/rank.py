"""One process of an all-reduce: joins the others, sums tensors with them, and times it.

A script, not a module: it imports nothing of this project, so that a rank starts with torch alone.
In: its task as JSON, the one argument. Out: a line of JSON on stdout for each stage as it is
reached, so that a process which is stopped has said how far it came.

    {"stage": "starting"}  {"stage": "joining"}  {"stage": "joined"}
    {"stage": "reducing", "bytes": 65536}  {"bytes": 65536, "seconds": 1e-4, "right": true}
    {"stage": "done"}
"""

import ctypes
import json
import signal
import sys
import time
from datetime import timedelta
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Take part; an exception is the last line of stderr."""
    if sys.platform.startswith("linux"):  # not to outlive who started it
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    task = json.loads(sys.argv[1])
    _say(stage="starting")
    import torch
    from torch import distributed

    device = (
        torch.device("cuda", task["device"]) if task["backend"] == "nccl" else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _say(stage="joining")
    store = distributed.TCPStore(
        task["address"],
        task["port"],
        task["world"],
        is_master=task["rank"] == 0,
        timeout=timedelta(seconds=task["join_s"]),
    )
    distributed.init_process_group(
        task["backend"],
        store=store,
        rank=task["rank"],
        world_size=task["world"],
        timeout=timedelta(seconds=task["reduce_s"]),
    )
    _say(stage="joined")
    for size in task["sizes"]:
        _say(stage="reducing", bytes=size)
        _say(bytes=size, **_measure(distributed, torch, device, size, task))
    _say(stage="done")
    distributed.destroy_process_group()


def _measure(
    distributed: Any, torch: Any, device: Any, size: int, task: dict[str, Any]
) -> dict[str, Any]:
    """Seconds of one all-reduce of ``size`` bytes, on average, and whether its sum was right."""
    world = task["world"]
    tensor = torch.full((size // 4,), float(task["rank"] + 1), device=device)
    distributed.all_reduce(tensor)
    right = bool((tensor == world * (world + 1) / 2).all())
    for _ in range(task["warmups"]):
        distributed.all_reduce(tensor.zero_())
    _settle(torch, device)
    distributed.barrier()
    started = time.perf_counter()
    for _ in range(task["repeats"]):
        distributed.all_reduce(tensor)
    _settle(torch, device)
    return {"seconds": (time.perf_counter() - started) / task["repeats"], "right": right}


def _settle(torch: Any, device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
