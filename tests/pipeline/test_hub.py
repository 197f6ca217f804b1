"""Models by the name of a repository: download, cache, offline use and upload, with a local server."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
from hub_server import Hub

from lumos import LumosPipeline, VideoPipeline
from lumos.cli import main
from lumos.commands.loading import load, model_sha256
from lumos.data.trained_on import TrainedOn
from lumos.errors import NotFound, RunError, UserError
from lumos.files import folder_sha256
from lumos.pipeline.hub import is_repository, local_folder

NAME = "org/micro"


@pytest.fixture
def hub(monkeypatch, tmp_path: Path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


@pytest.fixture
def filled(hub: Hub, micro_folder: Path) -> Hub:
    files = (path for path in micro_folder.rglob("*") if path.is_file())
    hub.repositories[NAME] = {path.relative_to(micro_folder).as_posix(): path.read_bytes() for path in files}
    hub.repositories[NAME]["training_state.bin"] = b"not for a pipeline"
    return hub


def clip(pipe: VideoPipeline) -> np.ndarray:
    return pipe("a red circle", seed=1, output_type="uint8").frames[0]


def test_a_model_is_downloaded_once_and_then_cached(filled: Hub, micro_folder: Path):
    whole = clip(VideoPipeline.from_pretrained(micro_folder, device="cpu"))
    np.testing.assert_array_equal(clip(VideoPipeline.from_pretrained(NAME, device="cpu")), whole)
    assert not any("training_state.bin" in line for line in filled.requests)
    assert any(line.startswith("GET") and "model.safetensors" in line for line in filled.requests)
    filled.requests.clear()
    np.testing.assert_array_equal(clip(LumosPipeline.from_pretrained(NAME, device="cpu")), whole)
    assert not any(line.startswith("GET") and "/resolve/" in line for line in filled.requests)


def test_without_a_connection_the_cache_serves(filled: Hub, monkeypatch, capsys):
    folder = local_folder(NAME)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert local_folder(NAME) == folder
    with pytest.raises(RunError, match="could not be reached"):
        local_folder("org/other")
    assert main(["generate", "--model", "org/other", "--prompt", "x"]) == 1
    *bars, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: there is no model folder org/other")
    assert not any("rror" in line for line in bars)


def test_the_arguments_of_the_hub_are_passed_on(filled: Hub, tmp_path: Path):
    with pytest.raises(NotFound, match="not in the cache; leave local_files_only out"):
        VideoPipeline.from_pretrained(NAME, cache_dir=tmp_path, local_files_only=True)
    for cls in (VideoPipeline, LumosPipeline):
        pipe = cls.from_pretrained(NAME, cache_dir=tmp_path, token="hf_test", device="cpu")
        assert tmp_path in Path(pipe.tokenizer_folders[0]).parents
    filled.requests.clear()
    VideoPipeline.from_pretrained(NAME, cache_dir=tmp_path, local_files_only=True, device="cpu")
    assert filled.requests == []


def test_an_adapter_may_be_a_repository(filled: Hub, micro_folder: Path):
    filled.repositories["me/adapter"] = {"adapter_config.json": b'{"peft_type": "LOHA"}', "lumos_adapter.json": b"[]"}
    pipe = VideoPipeline.from_pretrained(micro_folder, device="cpu")
    for loads in (pipe.load_lora_weights, lambda name: VideoPipeline.from_pretrained(micro_folder, device="cpu", lora=name)):
        with pytest.raises(UserError, match=r"lumos_adapter\.json is damaged"):
            loads("me/adapter")


def test_lists_hash_the_files_of_a_repository(filled: Hub, monkeypatch):
    filled.repositories["me/adapter"] = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
    monkeypatch.setattr(VideoPipeline, "from_pretrained", lambda folder, **options: options["lora"])
    args = argparse.Namespace(model=NAME, lora="me/adapter", dtype=None)
    adapter, model = load(args)
    assert model_sha256(model, args) == {"model": folder_sha256(Path(model)), "lora": folder_sha256(Path(adapter))}


@pytest.mark.parametrize(("file", "said"), [
    ("adapter_config.json", "it is an adapter: give it as lora"), ("export/config.json", "it is a run, whose model is .*export"),
    ("other.json", "give the folder of a saved or released model"),
])  # fmt: skip
def test_a_folder_beside_the_one_that_was_meant(tmp_path: Path, file: str, said: str):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    with pytest.raises(NotFound, match=f"is no model folder: it has no config.json; {said}"):
        VideoPipeline.from_pretrained(tmp_path)


def test_a_repository_that_does_not_exist(hub: Hub):
    with pytest.raises(NotFound, match="no org/none on"):
        VideoPipeline.from_pretrained("org/none")


def test_paths_are_no_repositories(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    assert is_repository("org/name")
    for path in ("runs/tiny", "nowhere", "a/b/c", "/a/b", "./a", "../a", "a/../b", "org/", "org/na me", str(tmp_path)):
        assert not is_repository(path), path


def test_a_pipeline_is_pushed_as_a_whole_folder_with_a_card(hub: Hub, micro_folder: Path):
    pipe = VideoPipeline.from_pretrained(micro_folder, device="cpu")
    pipe.trained_on = TrainedOn.of(["a red circle"], {"shapes": ["circle"]})
    address = pipe.push_to_hub("me/mine", token="hf_test")
    assert address.startswith(f"{hub.address}/me/mine/commit/")
    files = hub.repositories["me/mine"]
    assert {"config.json", "model.safetensors", "pipeline.json", "trained_on.json", "README.md"} <= files.keys()
    assert any(name.startswith("video_tokenizer/") for name in files)
    card = files["README.md"].decode()
    assert 'from_pretrained("me/mine")' in card
    assert "| shapes | circle |" in card
    pipe.push_to_hub("short", token="hf_test")
    assert 'from_pretrained("me/short")' in hub.repositories["me/short"]["README.md"].decode()
    again = VideoPipeline.from_pretrained("me/mine", device="cpu")
    np.testing.assert_array_equal(clip(again), clip(pipe))
    assert again.trained_on == pipe.trained_on
