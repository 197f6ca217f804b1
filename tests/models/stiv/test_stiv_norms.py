"""Options of STIV's norms and of the target of its last layer, for studies; the published values are the default."""

from __future__ import annotations

import pytest
import torch

from lumos.models.stiv.configuration import OMITTED, StivConfig
from lumos.models.stiv.flow import MIN_TIME, interpolated, velocity_of_noise
from lumos.models.stiv.modeling import StivForVideoGeneration
from lumos.runtime import parameter_count

SIZES = {
    "latent_channels": 2, "hidden_size": 64, "num_hidden_layers": 2, "text_width": 64, "text_layers": 1, "text_vocab_size": 16,
    "unmasked_layers": 1,
}  # fmt: skip


def model_with(**changes) -> StivForVideoGeneration:
    torch.manual_seed(0)
    model = StivForVideoGeneration(StivConfig(**SIZES | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return model


def inputs() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return {"latents": torch.randn(2, 3, 2, 4, 4, generator=random), "t": torch.tensor([0.01, 0.6]),
            "text_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}  # fmt: skip


@pytest.mark.parametrize("change", [
    {"qk_norm": False}, {"sandwich_norm": False}, {"condition_norm": False}, {"prediction": "noise"},
])  # fmt: skip
def test_each_switch_changes_the_result_and_trains(change: dict):
    whole, other = model_with(), model_with(**change)
    found = other(**inputs()).sample
    assert not torch.allclose(whole(**inputs()).sample, found, atol=1e-3)
    found.square().mean().backward()
    used = {name: p for name, p in other.named_parameters() if name != "mask_token"}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in used.values())


@pytest.mark.parametrize("change", [{}, {"qk_norm": False}, {"qk_norm": False, "sandwich_norm": False, "condition_norm": False}])
def test_weights_are_counted_and_pieces_agree(change: dict, monkeypatch):
    model = model_with(**change).eval()
    text = parameter_count(model.text_encoder)
    assert parameter_count(model) - text == model.config.num_parameters
    whole = model(**inputs()).sample.detach()
    monkeypatch.setattr("lumos.models.stiv.block.piece_size", lambda x: 3)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs()).sample, whole, atol=2e-5, rtol=1e-4)


def test_defaults_are_left_out_of_the_config(tmp_path):
    assert not OMITTED.keys() & StivConfig(**SIZES).to_dict().keys()
    changed = {"qk_norm": False, "sandwich_norm": False, "condition_norm": False, "prediction": "noise"}
    model = model_with(**changed)
    model.save_pretrained(tmp_path)
    again = StivForVideoGeneration.from_pretrained(tmp_path)
    assert {name: getattr(again.config, name) for name in changed} == changed
    torch.testing.assert_close(again(**inputs()).sample, model(**inputs()).sample)


def test_the_velocity_of_the_true_noise_is_true():
    random = torch.Generator().manual_seed(2)
    data, noise = (torch.randn(3, 2, 2, 4, 4, generator=random) for _ in range(2))
    t = torch.tensor([MIN_TIME, 0.5, 1.0])
    found = velocity_of_noise(interpolated(data, noise, t), noise, t)
    torch.testing.assert_close(found, data - noise, atol=1e-5, rtol=1e-4)
    assert torch.isfinite(velocity_of_noise(data, noise, torch.zeros(3))).all()


@pytest.mark.parametrize(("change", "message"), [({"prediction": "data"}, "prediction 'data' is unknown"),
                                                 ({"qk_norm": 1}, "qk_norm 1 is not allowed")])  # fmt: skip
def test_wrong_switches(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        StivConfig(**SIZES | change)
