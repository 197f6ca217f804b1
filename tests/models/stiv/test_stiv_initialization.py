from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lumos.errors import UserError
from lumos.models.stiv.configuration import StivConfig
from lumos.models.stiv.initialization import TEMPORAL, inherited, initialized, position_scale
from lumos.models.stiv.modeling import Micro, StivForVideoGeneration

T = torch.tensor([0.3, 0.8])
PICTURES = {"temporal_attention": False}
GRID = {"time": 1, "rows": 2, "columns": 2}


def clip(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("frames", [1, 4])
def test_image_weights_in_a_video_stack_act_frame_by_frame(micro_stiv, micro_stiv_config, stiv_text, frames):
    image, video, text = micro_stiv(**PICTURES), StivForVideoGeneration(micro_stiv_config()).eval(), stiv_text(2)
    video.load_state_dict(inherited(video, image))
    x = clip(2, frames, 3, 4, 4)
    together = video(x, T, *text, micro=(facts := one_frame(video.config, 2))).sample
    for frame in range(frames):
        alone = image(x[:, frame : frame + 1], T, *text, micro=facts).sample
        assert torch.allclose(together[:, frame : frame + 1], alone, atol=1e-5)


def one_frame(config: StivConfig, batch: int) -> Micro:
    return Micro.default(config, batch, 1, 4, 4)


def test_image_weights_act_on_repeated_frames(micro_stiv, micro_stiv_config, stiv_text):
    image, text = micro_stiv(**PICTURES), stiv_text(2)
    video = StivForVideoGeneration(micro_stiv_config(temporal_patch_size=2)).eval()
    video.load_state_dict(inherited(video, image))
    x = clip(2, 2, 3, 4, 4)
    repeated = video(x.repeat_interleave(2, 1), T, *text, micro=(facts := one_frame(image.config, 2))).sample
    for frame in range(4):
        alone = image(x[:, frame // 2 : frame // 2 + 1], T, *text, micro=facts).sample
        assert torch.allclose(repeated[:, frame : frame + 1], alone, atol=1e-5)


def test_two_parents_give_space_and_time(micro_stiv, micro_stiv_config):
    image, low, child = micro_stiv(1, **PICTURES), micro_stiv(2), StivForVideoGeneration(micro_stiv_config())
    found = inherited(child, image, low)
    for name, value in found.items():
        parent = low if TEMPORAL.match(name) else image
        assert value.equal(parent.state_dict()[name]), name
    assert any(map(TEMPORAL.match, found))
    video = micro_stiv(3)  # a video model as the first parent gives everything
    assert all(value.equal(video.state_dict()[name]) for name, value in inherited(child, video).items())


def test_wrong_or_missing_weights_are_listed(micro_stiv, micro_stiv_config):
    image = micro_stiv(**PICTURES)
    other = StivForVideoGeneration(micro_stiv_config(num_hidden_layers=4, text_width=128))
    with pytest.raises(UserError) as error:
        inherited(other, image)
    for part in ("lacks blocks.3.cross.k_norm.weight", "and ", "has in another shape conditions.text.weight"):
        assert part in str(error.value)
    with pytest.raises(UserError, match=r"unknown to this model, blocks\.2"):
        inherited(StivForVideoGeneration(micro_stiv_config(num_hidden_layers=2, **PICTURES)), image)
    pictures = StivForVideoGeneration(micro_stiv_config(**PICTURES))
    for parents, message in (
        ((image, micro_stiv(**PICTURES)), "without temporal attention; give a video model"),
        ((micro_stiv(),), "a model for pictures cannot be made of it"),
        ((image, micro_stiv()), "init.temporal has no effect"),
    ):
        with pytest.raises(UserError, match=message):
            inherited(StivForVideoGeneration(micro_stiv_config()) if "give a video" in message else pictures, *parents)
    with pytest.raises(UserError, match="temporal_patch_size 1 cannot be made of a model with 2"):
        inherited(StivForVideoGeneration(micro_stiv_config()), micro_stiv(temporal_patch_size=2))


def test_an_old_folder_and_a_new_size_write_the_position_scales(micro_stiv, micro_stiv_config, stiv_text, tmp_path):
    image = micro_stiv(1, **PICTURES, trained_grid=GRID)
    low = micro_stiv(2, trained_grid=GRID | {"time": 4}, position_scale={"time": 0.5, "rows": 1.0, "columns": 1.0})
    image.save_pretrained(tmp_path / "image")
    low.save_pretrained(tmp_path / "low")
    config = micro_stiv_config(trained_grid={"time": 8, "rows": 4, "columns": 2})
    model, record = initialized(config, tmp_path / "image", tmp_path / "low")
    assert model.config.position_scale == {"time": 0.25, "rows": 0.5, "columns": 1.0}
    assert record["image"]["folder"] == str(tmp_path / "image")
    assert record["position_scale"] == model.config.position_scale
    model.save_pretrained(tmp_path / "new")
    loaded, text, x = StivForVideoGeneration.from_pretrained(tmp_path / "new"), stiv_text(2), clip(2, 8, 3, 8, 4)
    assert loaded.config.position_scale == model.config.position_scale
    assert loaded(x, T, *text).sample.equal(model.eval()(x, T, *text).sample)
    fresh, _ = initialized(config, tmp_path / "image")
    assert fresh.config.position_scale["time"] == 1
    assert all(block.temporal_gain.eq(0).all() for block in fresh.blocks)


def test_positions_keep_their_scale_where_nothing_grew(micro_stiv_config):
    scale = {"time": 0.5, "rows": 1, "columns": 1}
    low = micro_stiv_config(trained_grid={"time": 8, "rows": 4, "columns": 4}, position_scale=scale)
    now = micro_stiv_config(trained_grid={"time": 4, "rows": 4, "columns": 2})
    assert position_scale(now, low) == low.position_scale
    with pytest.raises(UserError, match="trained_grid is None in the model to start from"):
        position_scale(now, micro_stiv_config())


# ---- folders


def test_a_model_in_shards_needs_all_of_them(micro_stiv, tmp_path):
    micro_stiv().save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    StivForVideoGeneration.from_pretrained(tmp_path)
    shards[1].unlink()
    with pytest.raises(UserError, match=f"lacks 1 of its {len(shards)} weight shards: {shards[1].name}"):
        StivForVideoGeneration.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"patch_in.bias": "../model.safetensors"}}')
    with pytest.raises(UserError, match="is not the name of a file in the same folder"):
        StivForVideoGeneration.from_pretrained(tmp_path)


@pytest.fixture
def folder(micro_stiv, tmp_path):
    micro_stiv().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_comes_back_the_same(micro_stiv, stiv_text, folder):
    model, text, x = micro_stiv(), stiv_text(2), clip(2, 4, 3, 4, 4)
    (folder / "notes.txt").write_text("kept")
    model.save_pretrained(folder)
    loaded = StivForVideoGeneration.from_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "kept"
    assert all(value.equal(loaded.state_dict()[name]) for name, value in model.state_dict().items())
    losses = []
    for one in (model, loaded):
        one.train()
        loss = (one(x, T, *text).sample - x).square().mean()
        loss.backward()
        torch.optim.SGD(one.parameters(), 0.1).step()
        losses.append([loss.item(), (one(x, T, *text).sample - x).square().mean().item()])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]
    half = StivForVideoGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_a_damaged_folder_is_named_with_its_fault(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    fewer = {name: value for name, value in tensors.items() if name not in ("mask_token", "patch_in.bias")}
    faults = {
        "it lacks mask_token, patch_in.bias": fewer,
        "it has, unknown to this model, patch_up.bias": tensors | {"patch_up.bias": torch.zeros(3)},
        "it has in another shape patch_in.bias": tensors | {"patch_in.bias": torch.zeros(3)},
    }
    for message, changed in faults.items():
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=message):
            StivForVideoGeneration.from_pretrained(folder)
    for content in (b"no tensors", b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match="is damaged or no safetensors file"):
            StivForVideoGeneration.from_pretrained(folder)
    file.unlink()
    with pytest.raises(UserError, match=r"has no weights; it needs model\.safetensors"):
        StivForVideoGeneration.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for changed, message in (({"num_hidden_layers": 2000}, "has .* tensors, too few for the 2000 blocks"),
                             ({"latents": "none"}, "latents 'none' is unknown")):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config | changed))
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=message):
            StivForVideoGeneration.from_pretrained(folder)
    (folder / "config.json").write_text("[1]")
    file.write_bytes(b"")
    with pytest.raises(UserError, match="a model's config is a JSON object"):
        StivForVideoGeneration.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        StivForVideoGeneration.from_pretrained(folder)
    with pytest.raises(UserError, match="there is no model folder"):
        StivForVideoGeneration.from_pretrained(folder / "none")
