from __future__ import annotations

import platform

import pytest
import torch

from lumos.errors import UserError
from lumos.runtime import pick_device, return_freed_memory


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize("device", [None, "auto", "cpu", torch.device("cpu")])
def test_without_a_gpu(no_gpu, device):
    assert pick_device(device) == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps"])
def test_a_device_that_is_not_there(no_gpu, device: str):
    with pytest.raises(UserError, match=f"device '{device}' is not available here; give cpu$"):
        pick_device(device)


@pytest.mark.parametrize("device", ["gpu9", "", "cuda:x", "meta"])
def test_an_unknown_device(device: str):
    with pytest.raises(UserError, match=f"device '{device}' is unknown; allowed: auto, cpu, cuda"):
        pick_device(device)


def test_with_two_gpus(two_gpus, monkeypatch):
    assert pick_device(None) == pick_device("cuda") == torch.device("cuda:0")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")
    with pytest.raises(UserError, match="device 'cuda:2' is not available here; give cpu or cuda"):
        pick_device("cuda:2")


HOLES = """
import sys, psutil, torch
from lumos.runtime import return_freed_memory
if sys.argv[1] == "returned":
    assert return_freed_memory(torch.device("cpu"))
torch.zeros(6 * 2**20)  # glibc now keeps blocks of up to 24 MiB in its heap
before = psutil.Process().memory_info().rss
kept = [torch.zeros(4 * 2**20) for _ in range(16)][::2]
print((psutil.Process().memory_info().rss - before) / 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_tensors_between_kept_ones_return_their_memory(forks):
    """Of 16 tensors of 16 MiB, every second one is freed; the heap keeps their memory unless it is told to return it."""
    held = {how: float(forks.run(["-c", HOLES, how]).stdout) for how in ("heap", "returned")}
    assert held["heap"] > 200
    assert held["returned"] < 150


def test_other_devices_need_nothing():
    assert return_freed_memory(torch.device("meta")) is False
