"""Defaults of torch that the library sets for a call and gives back, also when calls of several threads overlap."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lumos import VideoPipeline
from lumos.pipeline.request import Request
from lumos.runtime import plain_defaults


@pytest.fixture(autouse=True)
def usual():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")


def state() -> tuple[torch.dtype, str]:
    return torch.get_default_dtype(), torch.get_float32_matmul_precision()


PLAIN, OTHER = (torch.float32, "highest"), (torch.float64, "medium")


def change() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")


def test_a_call_that_ends_leaves_others_in_plain_defaults():
    change()
    first, second = plain_defaults(), plain_defaults()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert state() == PLAIN
    second.__exit__(None, None, None)
    assert state() == OTHER


def test_what_a_caller_sets_during_another_call_counts_after_it():
    with plain_defaults():
        change()
        with plain_defaults():
            assert state() == PLAIN
    assert state() == OTHER


def test_precisions_of_single_backends_are_given_back():
    matmul = torch.backends.mkldnn.matmul
    matmul.fp32_precision = "bf16"
    with plain_defaults():
        assert (matmul.fp32_precision, torch.get_float32_matmul_precision()) == ("ieee", "highest")
    assert matmul.fp32_precision == "bf16"


def test_a_request_is_encoded_in_plain_defaults_too(micro_folder):
    pipe = VideoPipeline.from_pretrained(micro_folder, device="cpu")
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), np.uint8)

    def encoded() -> torch.Tensor:
        return pipe.encode(pipe.resolve(Request.of("a cat", video=frames, num_frames=9, seed=1))).given[0]

    expected = encoded()
    change()
    torch.set_default_device("meta")
    try:
        found = encoded()
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)
