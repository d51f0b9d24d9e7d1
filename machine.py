"""The machine: devices, processes, precision and memory. train.py, eval.py, visualize.py use it.

    python train.py --device cpu                   # or cuda, or mps; auto finds out
    torchrun --nproc-per-node 8 train.py           # sets RANK, WORLD_SIZE, ...: see launcher
"""
import ctypes
import os
import signal
import sys
import time
import torch
import torch.distributed as dist
from model import UserError

DEVICES = ("auto", "cpu", "cuda", "mps")


class BadData(UserError):
    """Found by one process alone, which has to say so itself; what all find, the first one says."""


def pick_device(name="auto"):
    """One of DEVICES -> cpu, cuda or mps (Apple). auto: a GPU that CUDA or ROCm knows, else the
    CPU. Raises UserError if there is no such device."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if there["cuda"] else "cpu"
    if not there[name]:
        raise UserError(f"--device {name}: this PyTorch ({torch.__version__}) finds no such GPU; "
                        f"use --device cpu, or install a PyTorch built for the GPU")
    return name


def launcher():
    """What torchrun says -> rank, number of processes, number on this machine. Or BadData."""
    says = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": ""}
    rank, world, local, *master = (os.environ.get(name, says[name]) for name in says)
    if all(x.isdigit() for x in (rank, world, local)) and int(rank) < int(world):
        if world == "1" or all(master):
            return int(rank), int(world), int(local)
    said = [f"{name}={os.environ[name]!r}" for name in says if name in os.environ]
    lacks = [f"no {name}" for name in says if name not in os.environ]
    raise BadData(f"the environment has {', '.join(said + lacks)}, which torchrun would not leave "
                  f"so: start with `torchrun --nproc-per-node 2 train.py ...`, or unset them")


def start_processes(args):
    """Join the processes of torchrun, if there are several -> rank, number of processes, device."""
    rank, world, local = launcher()
    device = torch.device(args.device, local if args.device == "cuda" else None)
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"{local + 1} processes but {torch.cuda.device_count()} GPUs: lower "
                            f"--nproc-per-node, or use --device cpu")
        torch.cuda.set_device(device)
    elif device.type == "mps" and world > 1:
        raise UserError("--device mps serves one process: start train.py without torchrun")
    else:
        keep_memory()
        if world > 1:                                        # torchrun leaves each one thread
            cores = os.cpu_count()
            if hasattr(os, "sched_getaffinity"):
                cores = len(os.sched_getaffinity(0))
            here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
            torch.set_num_threads(max(1, cores // here))
    if world > 1:
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as e:              # as if the port is taken
            raise BadData(f"process {rank} can't meet the others ({str(e).splitlines()[0]}): start "
                          f"all of them with one torchrun") from None
    return rank, world, device


def leave_processes():
    """Leave the process group. Gloo's threads may still be releasing the last gather's tensors, for
    which they need Python's lock: an interpreter that ended meanwhile would abort."""
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.2)


def ignore_ctrl_c(worker):
    """Ctrl-C reaches the data workers too; the main process decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def keep_memory():
    """Let Linux's C library keep what a step frees for the next one. Else the system hands it out
    again page by page, each wiped first: a tenth to a third of a small model's step."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    mallopt(M_TRIM_THRESHOLD, 1 << 30)
    if not mallopt(M_MMAP_THRESHOLD, 1 << 30):               # older versions stop at 32 MB
        mallopt(M_MMAP_THRESHOLD, 1 << 25)


def pick_precision(amp, device):
    """auto -> bf16 where a matmul in it really is faster, fp16 on GPUs without bf16, else off."""
    if amp != "auto":
        return amp
    if device.type == "mps":
        return "off"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1024, 1024).to(dtype)
        x @ x
        start = time.perf_counter()
        for _ in range(3):
            x @ x
        seconds[dtype] = time.perf_counter() - start
    return "bf16" if seconds[torch.bfloat16] < 0.7 * seconds[torch.float32] else "off"


def peak_memory():
    """The most memory this process has held, on the GPU if any, in MB, or None if unknown."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        import resource
    except ImportError:
        return None
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
