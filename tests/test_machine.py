"""Tests of machine.py: devices that are not there, and environments that torchrun did not make.

    pytest tests/test_machine.py
"""
import os
import subprocess
import sys
import pytest
import torch
import machine
from model import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", bool)
    monkeypatch.setattr(torch.backends.mps, "is_available", bool)


def test_devices(no_gpu, monkeypatch):
    """auto takes CUDA, never mps by itself; a GPU that is missing is one sentence."""
    assert machine.pick_device("auto") == machine.pick_device("cpu") == "cpu"
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"--device {name}: .* finds no such GPU; use --device"):
            machine.pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.pick_device() == machine.pick_device("cuda") == "cuda"


@pytest.mark.parametrize("words", ["train.py", "eval.py nowhere",
                                   "visualize.py nowhere --image a.png --text x"])
def test_a_missing_gpu_is_one_sentence(words):
    """In all three commands, with exit code 1 or 2 and no traceback."""
    if torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    r = subprocess.run([sys.executable, *words.split(), "--device", "mps"], cwd=ROOT,
                       capture_output=True, text=True)
    assert r.returncode in (1, 2) and len(r.stderr.strip().splitlines()) == 1
    assert f"{words.split()[0]}: --device mps: this PyTorch" in r.stderr


TORCHRUN = dict(RANK="3", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="here", MASTER_PORT="1")


@pytest.mark.parametrize("variables, found", [
    ({}, (0, 1, 0)), ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0)), (TORCHRUN, (3, 8, 1)),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "no LOCAL_RANK, no MASTER_ADDR"),
    ({"RANK": "1"}, "RANK='1'"), ({"RANK": ""}, "RANK=''"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"), ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
    (TORCHRUN | {"RANK": "8"}, "RANK='8'"), (TORCHRUN | {"MASTER_PORT": ""}, "MASTER_PORT=''"),
    ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'")])
def test_launcher(monkeypatch, variables, found):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(found, tuple):
        assert machine.launcher() == found
    else:
        with pytest.raises(machine.BadData, match=f"{found}.*start with `torchrun"):
            machine.launcher()


@pytest.mark.parametrize("variables", [{"RANK": "0", "WORLD_SIZE": "2"}, {"WORLD_SIZE": ""},
                                       {"RANK": "1", "WORLD_SIZE": "2"}])
def test_train_py_says_so(variables, tmp_path):
    """Every process, not only the first, as each may be a terminal of its own."""
    clear = {k: v for k, v in os.environ.items() if k not in TORCHRUN}
    r = subprocess.run([sys.executable, os.path.join(ROOT, "train.py")], cwd=tmp_path,
                       env=clear | variables, capture_output=True, text=True)
    assert r.returncode == 2 and r.stderr.startswith("train.py: the environment has")
    assert len(r.stderr.splitlines()) == 1 and not os.listdir(tmp_path)
