"""Every item that tests/golden/README.md lists for the decoder; sizes are read from the files, so another folder can be used."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lumos import LumosForVideoGeneration
from lumos.models.lumos1.attention import dense_mask
from lumos.models.lumos1.loss import frame_losses
from lumos.models.lumos1.masking import mask_sequence
from lumos.models.lumos1.rope import position_ids
from lumos.models.lumos1.sequence import build_sequence, code_mask, content_mask, parse_layout, parse_sequence

TOLERANCE = {"atol": 2e-4, "rtol": 0}
TRACES = ("trace_t2v", "trace_i2v")


@pytest.fixture(scope="module")
def model(golden):
    return LumosForVideoGeneration.from_pretrained(golden, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def forward(golden):
    return load_file(golden / "forward.safetensors")


@pytest.fixture(scope="module")
def layouts(model, forward):
    return parse_layout(forward["input_ids"], model.config)


def test_visual_positions(model, forward, layouts):
    found = content_mask(layouts, forward["input_ids"].shape[1])
    for b, layout in enumerate(layouts):
        assert torch.equal(found[b, : layout.length], forward["is_visual"][b, : layout.length].bool())


def test_positions(model, forward, layouts):
    length = forward["input_ids"].shape[1]
    content = content_mask(layouts, length)
    found = position_ids(layouts, length, model.config)
    for b, layout in enumerate(layouts):
        for axis, name in enumerate("thw"):
            used = content[b, : layout.length]
            expected = forward[f"position_{name}"][b, : layout.length]
            assert torch.equal(found[b, axis, : layout.length][used], expected[used])
            text = forward["position_text"][b, : layout.length]
            assert torch.equal(found[b, axis, : layout.length][~used], text[~used])


def test_attention_rule(forward, layouts):
    mask = dense_mask(layouts, forward["input_ids"].shape[1])
    for b, layout in enumerate(layouts):
        n = layout.length
        assert torch.equal(mask[b, :n, :n], forward["attention_allowed"][b, :n, :n].bool())


@pytest.mark.parametrize("attention", ["segmented", "dense"])
def test_logits(model, forward, layouts, attention, monkeypatch):
    monkeypatch.setattr(model.config, "attention", attention)
    c = model.config
    with torch.no_grad():
        logits = model(forward["input_ids"]).logits[..., c.visual_token_start :][..., : c.visual_token_count]
    for b, layout in enumerate(layouts):
        torch.testing.assert_close(logits[b, : layout.length], forward["logits_visual"][b, : layout.length], **TOLERANCE)


def test_ids_are_built_and_parsed_as_published(model, forward, layouts):
    for row, layout in zip(forward["input_ids"], layouts, strict=True):
        ids = row[: layout.length]
        parsed = parse_sequence(ids, model.config)
        built = build_sequence(
            parsed.text_ids, parsed.codes, fps=parsed.fps, duration=parsed.duration, config=model.config
        )
        assert torch.equal(built, ids)


def test_ardf_loss(model, golden):
    g = load_file(golden / "ardf.safetensors")
    with torch.no_grad():
        out = model(g["masked_ids"], targets=g["target"])
    torch.testing.assert_close(out.loss, g["loss"].squeeze(), atol=1e-4, rtol=0)
    torch.testing.assert_close(frame_losses(out.position_loss, out.frame_index), g["frame_loss"], atol=1e-4, rtol=0)


def test_ardf_masks_are_tubes_of_the_stated_ratio(model, golden):
    """The published mask is one pattern for all frames with the exact count; ours has the same form and the same targets."""
    g, c = load_file(golden / "ardf.safetensors"), model.config
    layouts = parse_layout(g["clean_ids"], c)
    codes = code_mask(layouts, g["clean_ids"].shape[1])
    for b, layout in enumerate(layouts):
        hidden = g["masked_ids"][b] == c.mask_token_id
        frames = torch.stack([hidden[f.content_start : f.end - 1] for f in layout.frames])
        assert (frames == frames[0]).all()
        n = frames.shape[1]
        assert int(frames[0].sum()) == max(1, round(n * float(g["mask_prob"][b])))
        supervised = hidden & codes[b]
        assert torch.equal(g["target"][b] != -100, supervised)
        assert torch.equal(g["target"][b][supervised], g["clean_ids"][b][supervised] - c.visual_token_start)
        ours = mask_sequence(g["clean_ids"][b, : layout.length], c, generator=torch.Generator().manual_seed(b))
        ours_hidden = ours.input_ids == c.mask_token_id
        ours_frames = torch.stack([ours_hidden[f.content_start : f.end - 1] for f in layout.frames])
        assert (ours_frames == ours_frames[0]).all()
        assert int(ours_frames[0].sum()) == max(1, round(n * ours.ratios[0]))


@pytest.mark.parametrize("name", TRACES)
def test_trace_commits_hold_the_periodic_history_mask(model, golden, name):
    from lumos.models.lumos1.masking import history_mask

    settings = json.loads((golden / f"{name}.json").read_text())
    g, (h, w) = load_file(golden / f"{name}.safetensors"), settings["grid"]
    expected = history_mask(h * (w + 1), settings["history_mask_ratio"])
    for call in settings["order"]:
        if "commit" in call:
            content = g[f"{call}.input_ids"][0, 3:-1]
            assert torch.equal(content == model.config.mask_token_id, expected), call


@pytest.mark.parametrize("name", TRACES)
def test_trace_unmasks_on_the_published_schedule(model, golden, name):
    from lumos.models.lumos1.masking import unmasking_counts

    settings = json.loads((golden / f"{name}.json").read_text())
    g, (h, w) = load_file(golden / f"{name}.safetensors"), settings["grid"]
    counts = [h * w, *unmasking_counts(h * w, settings["steps"])]
    for call in settings["order"]:
        if "commit" not in call:
            step = int(call.split("_")[1][1:])
            grid = g[f"{call}.input_ids"][0, -(h * (w + 1) + 1) : -1].view(h, w + 1)[:, :w]
            assert int((grid == model.config.mask_token_id).sum()) == counts[step], call
