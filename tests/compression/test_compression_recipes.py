"""The shipped configs of `compress distill` load, name shipped models, and follow section 9 of the specification."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import verbs

from lumos.compression.decoder_distillation import distill_decoder
from lumos.compression.distillation import distill
from lumos.compression.networks import network_of
from lumos.compression.plans import Plan
from lumos.compression.pruning import prune
from lumos.compression.recipes import read_recipe
from lumos.training.settings import load_settings

REPO = Path(__file__).parents[2]
RECIPES = sorted((REPO / "configs/compression").glob("*.yaml"))
PEAKS = {"lumos-tiny": "lumos1/tiny-gpu", "stiv-tiny": "stiv/tiny-t2v"}


@pytest.fixture(scope="module")
def small_decoder(tmp_path_factory) -> Path:
    """The shipped tokenizer without the units of the plan that the recipe names."""
    network = network_of(REPO / "checkpoints/lumos-tiny", "decoder")
    remove = network.on_meta().named_plans()["shallow"]
    folder = tmp_path_factory.mktemp("recipes") / "small"
    record = prune(network, Plan("shallow", "decoder", "block", remove, sha256=network.sha256), folder)
    assert record["before"]["flops"] / record["after"]["flops"] > 1.5
    return folder


def test_the_pages_recover_what_they_have_pruned():
    """The teacher of the command is the model that was pruned, clips have its shape, and the report compares these models."""
    pruned = {words[words.index("--out") + 1]: words[words.index("--model") + 1]
              for words in verbs("docs/compression.md") if words[:2] == ["compress", "prune"] and "--out" in words}  # fmt: skip
    commands = [words for words in verbs("docs/compression-recovery.md") if words[0] == "compress"]
    distill, report = (next(words for words in commands if words[1] == name) for name in ("distill", "report"))
    settings, _ = read_recipe(REPO / distill[3], distill[4:])
    teacher, clip = settings.distill.teacher, network_of(REPO / settings.distill.teacher).clip
    assert pruned[settings.model.from_] == teacher
    assert (settings.data.height, settings.data.width, settings.data.num_frames) == (clip.height, clip.width, clip.num_frames)
    assert report[3:6] == [teacher, settings.model.from_, str(settings.output_dir / "export")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path, small_decoder):
    of_decoder = path.stem == "tokenizer-decoder"
    settings, train = read_recipe(path, [f"start_from={small_decoder}"] if of_decoder else [])
    assert train is (distill_decoder if of_decoder else distill)
    teacher = settings.teacher if of_decoder else settings.distill.teacher
    text = path.read_text()
    shipped = f"checkpoints/{'lumos-tiny' if of_decoder else path.stem}"
    assert (REPO / shipped / "config.json").is_file()
    assert teacher == shipped or f"resize {shipped} --out {teacher}" in text
    assert f"--config configs/compression/{path.name}" in text
    assert f"--model {teacher}" in text
    assert f"--out {'runs/small-decoder' if of_decoder else settings.model.from_}" in text
    if of_decoder:
        assert (settings.max_minutes, settings.height, settings.teacher) == (60, 128, teacher)
        return
    training, first = settings.training, load_settings(REPO / f"configs/{PEAKS[path.stem]}.yaml").training
    assert (training.lr, training.schedule) == (first.lr / 2, "cosine")
    assert training.min_lr <= training.lr / 10
    assert training.ema_decay > 0
