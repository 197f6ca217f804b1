"""Conversion of complete and of incomplete released folders."""

from __future__ import annotations

import json

import pytest
import torch
from micro import micro_config
from safetensors.torch import load_file, save_file

from lumos import LumosConfig, LumosForVideoGeneration
from lumos.errors import UserError


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(model, tmp_path):
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    return tmp_path / "sharded"


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def rewrite(folder, change):
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("preset", "parameters"), [("1b", 1_503_729_664), ("3b", 3_614_630_912)])
def test_published_sizes(preset, parameters):
    with torch.device("meta"):
        model = LumosForVideoGeneration(LumosConfig.preset(preset))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match=r"known presets: tiny, 0\.5b, 1b, 3b"):
        LumosConfig.preset("7b")


def test_released_config_is_read(tmp_path):
    """Fields of a released config.json; its bos, eos and pad are class defaults that the layout does not use."""
    published = {
        "model_type": "chameleon", "architectures": ["ChameleonXLLMXForConditionalGeneration"], "vocab_size": 129536,
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "rope_theta": 500000.0, "rope_scaling": None, "bos_token_id": 1, "eos_token_id": 2,
        "mm_rope": True, "mask_image_logits": True, "vq_config": {}, "vocabulary_map": {"<s>": 0}, "torch_dtype": "bfloat16",
        "swin_norm": False, "model_parallel_size": 1, "dropout": 0.0, "z_loss_weight": 0.0, "max_position_embeddings": 65536,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = LumosConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.num_hidden_layers, config.rope_theta) == (3072, 28, 500000.0)
    assert (config.bos_token_id, config.position_scheme, config.visual_token_count) == (0, "mm_rope", 64000)
    for key, value in (("swin_norm", True), ("attention_bias", True), ("rope_scaling", {"type": "linear", "factor": 2.0})):
        (tmp_path / "config.json").write_text(json.dumps({**published, key: value}))
        with pytest.raises(ValueError, match=f"config\\.json has {key}"):
            LumosConfig.from_pretrained(tmp_path)


def test_shards_load_whole(model, sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert same_weights(LumosForVideoGeneration.from_pretrained(sharded), model)


def test_wrapper_prefixes_flat_norms_and_vq_weights_are_read(model, folder):
    def change(tensors):
        wrapped = "model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."
        renamed = {k.replace("model.layers.0.", wrapped): v for k, v in tensors.items()}
        return {
            **{k: v.squeeze(0) if "_norm." in k and "self_attn" in k else v for k, v in renamed.items()},
            "model.vqmodel.encoder.conv_in.weight": torch.zeros(3),
        }

    rewrite(folder, change)
    assert same_weights(LumosForVideoGeneration.from_pretrained(folder), model)


def test_norms_of_several_model_parallel_shards():
    torch.manual_seed(0)
    one = LumosForVideoGeneration(micro_config(num_key_value_heads=2)).eval()
    two = LumosForVideoGeneration(micro_config(num_key_value_heads=2, model_parallel_size=2)).eval()
    state = one.state_dict()
    two.load_state_dict({k: v.repeat(2, 1) if "self_attn" in k and "_norm." in k else v for k, v in state.items()})
    ids = torch.tensor([[0, 600, 601, 602]])
    with torch.no_grad():
        torch.testing.assert_close(one(ids).logits, two(ids).logits)
        two.model.layers[0].self_attn.q_norm.weight[1] *= 3
        two.model.layers[0].self_attn.q_norm.bias[1] += 1
        assert not torch.allclose(one(ids).logits, two(ids).logits, atol=1e-4)


def missing_shard(folder):
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()


def no_weights(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def cut_file(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:200])


def bad_config(folder):
    (folder / "config.json").write_text("{ no json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_shard, "weight shards: model-00001"),
        (no_weights, "has no weights; it needs model.safetensors"),
        (no_config, "has no config.json"),
        (cut_file, "is damaged or no safetensors file"),
        (bad_config, "config.json"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(sharded, damage, message):
    damage(sharded)
    with pytest.raises((UserError, OSError), match=message):
        LumosForVideoGeneration.from_pretrained(sharded)


def test_missing_and_unknown_tensors_and_wrong_shapes(folder):
    original = load_file(folder / "model.safetensors")
    rewrite(folder, lambda t: {k: v for k, v in t.items() if "k_norm.weight" not in k})
    with pytest.raises(UserError, match=r"lacks the tensors model\.layers\.0\.self_attn\.k_norm\.weight"):
        LumosForVideoGeneration.from_pretrained(folder)
    rewrite(folder, lambda _: {**original, "model.extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"does not know: model\.extra"):
        LumosForVideoGeneration.from_pretrained(folder)
    rewrite(folder, lambda _: {**original, "model.norm.weight": torch.zeros(3)})
    with pytest.raises(UserError, match=r"model\.norm\.weight has shape \[3\], config.json asks for \[64\]"):
        LumosForVideoGeneration.from_pretrained(folder)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no model folder at"):
        LumosForVideoGeneration.from_pretrained(tmp_path / "nowhere")


def test_theta_is_read_and_never_assumed_in_silence(tmp_path):
    sizes = {"model_type": "chameleon", "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "mm_rope": True}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}))
    assert LumosConfig.from_pretrained(tmp_path).rope_theta == 5e5
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    with pytest.warns(UserWarning, match="states no rope_theta"):
        assert LumosConfig.from_pretrained(tmp_path).rope_theta == 10_000
    del sizes["mm_rope"]
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "rope_theta": 1e4}))
    with pytest.warns(UserWarning, match="states no mm_rope"):
        assert LumosConfig.from_pretrained(tmp_path).position_scheme == "1d"


def test_a_damaged_index_and_a_subfolder(model, sharded, tmp_path):
    assert same_weights(LumosForVideoGeneration.from_pretrained(tmp_path, subfolder="sharded"), model)
    for text in ("{", "{}", "[]"):
        (sharded / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match=r"index\.json is damaged"):
            LumosForVideoGeneration.from_pretrained(sharded)


def test_targets_out_of_range(model, config):
    ids = torch.tensor([[0, 600, 601, 602]])
    with pytest.raises(ValueError, match="allowed: visual codes 0 to 63"):
        model(ids, targets=torch.tensor([[-100, 64, -100, -100]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([1], "config.json is damaged"),
        ({"hidden_size": "abc"}, "config.json: hidden_size 'abc' is not allowed; give a whole number from 1 to 131,072"),
        ({"hidden_size": 10**9}, "config.json: hidden_size 1000000000 is not allowed"),
        ({"num_hidden_layers": None}, "config.json: num_hidden_layers None is not allowed"),
        ({"num_hidden_layers": 1.0}, "config.json: num_hidden_layers 1.0 is not allowed"),
        ({"num_hidden_layers": 10**9}, "config.json: num_hidden_layers 1000000000 is not allowed"),
        ({"num_hidden_layers": 2000}, "too few for the 2000 layers of its config.json"),
        ({"rope_theta": "x"}, "config.json: rope_theta 'x' is not allowed"),
        ({"dtype": "frog"}, "config.json is damaged"),
        ({"num_labels": 10**9}, "config.json: more than 1,000 unknown fields, or num_labels over 1,000"),
        ({"prompt_template": "{prompt:>1000000000}"}, r"config.json: prompt_template '{prompt:>1000000000}' is not usable"),
    ],
)
def test_a_damaged_config_is_said(folder, change, message):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(change if isinstance(change, list) else {**config, **change}))
    with pytest.raises(UserError, match=message):
        LumosForVideoGeneration.from_pretrained(folder)
    file.write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged .*; download or copy it again"):
        LumosForVideoGeneration.from_pretrained(folder)


@pytest.mark.parametrize("name", [5, "../model.safetensors", "/etc/passwd"])
def test_an_index_names_files_of_its_folder(sharded, name):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], "k": name}}))
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        LumosForVideoGeneration.from_pretrained(sharded)
