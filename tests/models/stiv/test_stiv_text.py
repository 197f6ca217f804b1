from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from lumos.errors import UserError
from lumos.models.stiv.modeling import StivForVideoGeneration
from lumos.models.stiv.text_encoder import FrozenTextEncoder, padded, text_ids
from lumos.models.stiv.training import StivTask


class Letters:
    """A text tokenizer with an id for each letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]


def test_prompts_end_with_an_end_mark_and_the_null_text_is_one(micro_stiv_config):
    found = text_ids(Letters(), ["abc", "", "z"], micro_stiv_config())
    assert found.ids.tolist() == [[0, 1, 2, 32], [32, 32, 32, 32], [25, 32, 32, 32]]
    assert found.mask.sum(1).tolist() == [4, 1, 2]


def test_a_model_folder_has_the_print_of_its_text_tokenizer(micro_folder, clip_text, tmp_path):
    """The text tokenizer of another generator's folder is found too, although its config.json does not mention text."""
    of = StivTask.fingerprint_of
    assert of(str(micro_folder), "text") == of(str(micro_folder / "text_tokenizer"), "text")
    shutil.copytree(clip_text, tmp_path / "whole" / "text_encoder")
    (tmp_path / "whole" / "config.json").write_text('{"model_type": "stiv"}')
    assert of(str(tmp_path / "whole"), "text") == of(str(clip_text), "text") != of(str(micro_folder), "text")


def test_prompts_that_do_not_fit_are_refused(micro_stiv_config):
    with pytest.raises(UserError, match="has 16 tokens; allowed: at most 15"):
        text_ids(Letters(), ["a" * 16], micro_stiv_config())
    with pytest.raises(UserError, match="gives id 57; the text encoder has 32 ids"):
        text_ids(Letters(), [chr(ord("a") + 57)], micro_stiv_config())


def test_a_prompt_has_the_same_states_alone_and_in_a_batch(micro_stiv, micro_stiv_config):
    model = micro_stiv()
    batch = model.encode_text(*text_ids(Letters(), ["abcdef", "", "ba"], micro_stiv_config()))
    for row, prompt in enumerate(("abcdef", "", "ba")):
        alone = model.encode_text(*text_ids(Letters(), [prompt], micro_stiv_config()))
        length = len(prompt) + 1
        assert torch.allclose(batch.states[row, :length], alone.states[0], atol=1e-5)
        assert torch.allclose(batch.pooled[row], alone.states[0, -1], atol=1e-5)


def test_ids_in_the_forward_pass_are_encoded_and_trained(micro_stiv, micro_stiv_config):
    model = micro_stiv()
    ids, mask = text_ids(Letters(), ["abc", "b"], micro_stiv_config())
    x, t = torch.randn(2, 2, 3, 4, 4), torch.tensor([0.2, 0.6])
    found = model(x, t, text_ids=ids, text_mask=mask).sample
    assert found.equal(model(x, t, *model.encode_text(ids, mask)).sample)
    found.square().mean().backward()
    assert all(p.grad is not None for p in model.text_encoder.parameters())


def test_a_model_whose_encoder_is_a_folder_has_none(micro_stiv_config):
    model = StivForVideoGeneration(micro_stiv_config(text_encoder="folder"))
    with pytest.raises(ValueError, match="no text encoder of its own"):
        model.encode_text(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool))


@pytest.fixture(params=["clip", "t5"])
def encoder_folder(request, tmp_path):
    """A folder of transformers with a tiny text encoder and a word tokenizer that ends a text with </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "red": 2, "circle": 3, "<unk>": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    torch.manual_seed(0)
    if request.param == "clip":
        sizes = {"vocab_size": 8, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = CLIPTextModel(CLIPTextConfig(**sizes, max_position_embeddings=8, eos_token_id=1, bos_token_id=0, pad_token_id=0))
    else:
        model = T5EncoderModel(T5Config(vocab_size=8, d_model=64, d_kv=32, d_ff=64, num_layers=2, num_heads=2))
    model.save_pretrained(tmp_path)
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **marks).save_pretrained(tmp_path)
    return tmp_path


def test_a_frozen_encoder_gives_what_transformers_gives(encoder_folder, micro_stiv):
    encoder = FrozenTextEncoder.from_pretrained(encoder_folder, width=64)
    ids, mask = encoder.text_ids(["red circle", ""])
    assert ids.tolist() == [[2, 3, 1], [1, 0, 0]]
    found = encoder.encode(ids, mask)
    with torch.no_grad():
        alone = encoder.model(input_ids=ids[1:, :1]).last_hidden_state
    assert found.states.shape == (2, 3, 64)
    assert torch.allclose(found.pooled[1:], alone[:, 0], atol=1e-5)
    assert torch.allclose(found.pooled[0], found.states[0, 2])
    assert not any(p.requires_grad for p in encoder.model.parameters())
    model = micro_stiv(text_encoder="folder")
    assert model(torch.randn(2, 2, 3, 4, 4), torch.tensor([0.2, 0.6]), *found).sample.isfinite().all()


def test_a_frozen_encoder_that_does_not_fit_is_refused(encoder_folder):
    with pytest.raises(UserError, match="has width 64; the model needs text_width 128"):
        FrozenTextEncoder.from_pretrained(encoder_folder, width=128)
    encoder = FrozenTextEncoder.from_pretrained(encoder_folder, max_tokens=4)
    with pytest.raises(UserError, match="has 5 tokens; allowed: at most 4"):
        encoder.text_ids(["red red red red"])
    config = json.loads((encoder_folder / "config.json").read_text())
    (encoder_folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(UserError, match="holds a model of type 'bert'; a text encoder is one of clip_text_model, clip, t5"):
        FrozenTextEncoder.from_pretrained(encoder_folder)


def test_a_frozen_encoder_with_damaged_weights_is_refused(encoder_folder):
    (encoder_folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be loaded"):
        FrozenTextEncoder.from_pretrained(encoder_folder)
    with pytest.raises(UserError, match="config"):
        FrozenTextEncoder.from_pretrained(encoder_folder / "none")


def test_rows_of_ids_are_padded_on_the_right():
    found = padded([[1, 2], [3]], 9)
    assert found.ids.tolist() == [[1, 2], [3, 9]]
    assert found.mask.tolist() == [[True, True], [True, False]]
