"""A pipeline that is saved over another folder is the one that is loaded from there, whatever the folder had."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from micro_stiv import micro_pipeline

from lumos import VideoPipeline
from lumos.errors import UserError
from lumos.lora import CONFIG
from tokenizer import TextTokenizer


@pytest.fixture(scope="module", params=["lumos1", "stiv"])
def folder(request, micro_folder: Path, tmp_path_factory) -> Path:
    if request.param == "lumos1":
        return micro_folder
    made = tmp_path_factory.mktemp("stiv") / "model"
    micro_pipeline().save_pretrained(made)
    return made


def test_a_text_tokenizer_of_the_folder_before_does_not_stay(folder, tmp_path):
    pipe = VideoPipeline.from_pretrained(folder, device="cpu")
    shutil.copytree(folder, tmp_path / "model")
    other = TextTokenizer.train(["zebras yawn", "zoos yodel"], 600, reserved_symbols=[f"<reserved{i:03d}>" for i in range(1, 255)])
    other.save_pretrained(tmp_path / "model")  # as released models have it, not in a folder of its own
    expected = TextTokenizer.from_pretrained(folder).encode("a red circle")
    assert TextTokenizer.from_pretrained(tmp_path / "model").encode("a red circle") != expected
    pipe.save_pretrained(tmp_path / "model")
    assert TextTokenizer.from_pretrained(tmp_path / "model").encode("a red circle") == expected


def test_a_model_and_an_adapter_need_two_folders(folder, tmp_path):
    """Transformers would load both together."""
    pipe = VideoPipeline.from_pretrained(folder, device="cpu")
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / CONFIG).write_text("{}")
    for use in (pipe.save_pretrained, pipe.model.save_pretrained, VideoPipeline.from_pretrained):
        with pytest.raises(UserError, match="holds an adapter, which would be loaded with a model"):
            use(tmp_path / "model")
