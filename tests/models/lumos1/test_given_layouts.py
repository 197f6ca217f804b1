"""The picture of the last frame in a sequence: layouts, positions, masks, attention and the cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given as over
from hypothesis import settings
from hypothesis import strategies as st
from micro import micro_config

from lumos import LumosForVideoGeneration
from lumos.errors import UserError
from lumos.models.lumos1.attention import dense_mask
from lumos.models.lumos1.engine import DecodingEngine
from lumos.models.lumos1.flops import training_flops
from lumos.models.lumos1.masking import mask_sequence
from lumos.models.lumos1.patterns import BEGINS, PATTERNS, Given, drawn_given, trained_patterns
from lumos.models.lumos1.rope import position_ids
from lumos.models.lumos1.scoring import steps_back
from lumos.models.lumos1.sequence import (
    build_frames,
    build_last,
    build_prefix,
    build_sequence,
    code_mask,
    frame_indices,
    frame_times,
    parse_layout,
    parse_sequence,
)
from lumos.models.lumos1.settings import MASK_KINDS
from lumos.models.lumos1.training_cost import LumosTrainingCost, without_last

CONFIG = micro_config()
torch.manual_seed(0)
MODEL = LumosForVideoGeneration(CONFIG).eval()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sequence(seed: int, t: int, h: int, w: int, text: int | None = 3, with_last: bool = True) -> tuple[torch.Tensor, ...]:
    codes, last = (torch.randint(0, 64, shape, generator=seeded(seed)) for shape in ((t, h, w), (h, w)))
    ids = build_sequence(
        None if text is None else [600 + i for i in range(text)], codes, fps=8, duration=2, config=CONFIG,
        last=last if with_last else None,
    )  # fmt: skip
    return ids, codes, last


sizes = {
    "t": st.integers(2, 5), "h": st.integers(1, 3), "w": st.sampled_from([1, 2, 4]), "text": st.none() | st.integers(0, 4),
}  # fmt: skip


@over(seed=st.integers(0, 99), **sizes)
@settings(max_examples=30, deadline=None)
def test_the_last_picture_has_its_own_time(seed, t, h, w, text):
    """Compares with the written rule: the first frame, the number of the last latent frame, its picture, the other frames."""
    ids, codes, last = sequence(seed, t, h, w, text)
    spans = build_frames(torch.cat([codes, last[None]]), CONFIG)
    head = build_prefix(None if text is None else [600 + i for i in range(text)], fps=8, duration=2, config=CONFIG)
    expected = [*head, *spans[0].tolist(), CONFIG.number_token_start + t - 1, *spans[t].tolist(), *spans[1:t].flatten().tolist()]
    assert ids.tolist() == [*expected, CONFIG.video_end_token_id, CONFIG.sep_token_id]
    (layout,) = parse_layout(ids[None], CONFIG)
    assert layout.times == (0, t - 1, *range(1, t))
    assert layout.num_latent_frames == t
    parsed = parse_sequence(ids, CONFIG)
    assert torch.equal(parsed.codes, codes)
    assert torch.equal(parsed.last, last)

    positions = position_ids([layout], len(ids), CONFIG)[0]
    numbers, at = frame_times([layout], len(ids))[0], len(head)
    for place, time in enumerate((0, t - 1, *range(1, t))):
        assert (frame_indices([layout], len(ids))[0][at : at + len(spans[0])] == place).all()
        assert (numbers[at : at + len(spans[0])] == time).all()
        for row in range(h):
            for col in range(w + 1):
                assert positions[:, at + 3 + row * (w + 1) + col].tolist() == [
                    len(head) + 3 + 4 * time, len(head) + 3 + 8 * row, len(head) + 3 + 8 * col,
                ]  # fmt: skip
        at += len(spans[0]) + (place == 0)
    assert int((numbers >= 0).sum()) == (t + 1) * len(spans[0])


def test_layouts_of_one_shape_at_other_times_are_different():
    """Rows with equal layouts share positions, so layouts with different times must not be equal."""
    plain, ends = sequence(0, 3, 2, 3, with_last=False)[0], sequence(0, 2, 2, 3)[0]
    of_plain, of_ends = parse_layout(plain[None], CONFIG)[0], parse_layout(ends[None], CONFIG)[0]
    assert of_plain.times == (0, 1, 2) != of_ends.times
    assert of_plain != of_ends


def test_frames_between_see_first_and_last():
    ids, *_ = sequence(0, 4, 2, 2)
    layouts = parse_layout(ids[None], CONFIG)
    mask = dense_mask(layouts, len(ids))[0]
    first, last, *between = layouts[0].frames
    for frame in between:
        assert mask[frame.start : frame.end, : frame.end].all()
        assert not mask[first.start : last.end, frame.start : frame.end].any()
    assert mask[last.start : last.end, : last.end].all()


@pytest.mark.parametrize("number", [2, 3])
def test_grammar_of_the_last_picture(number: int):
    ids, _, last = sequence(0, 3, 2, 2)
    wrong = ids.clone()
    at = parse_layout(ids[None], CONFIG)[0].frames[1].start - 1
    wrong[at] = CONFIG.number_token_start + number
    if number == 2:
        assert torch.equal(wrong, ids)
    else:
        with pytest.raises(ValueError, match=f"leaves the grammar at token {at}"):
            parse_sequence(wrong, CONFIG)
    with pytest.raises(UserError, match="the last latent frame 9999 has no number token"):
        build_last(last, 9999, CONFIG)


@over(
    seed=st.integers(0, 99), kind=st.sampled_from(MASK_KINDS), pattern=st.sampled_from(PATTERNS), hide=st.booleans(), **sizes
)
@settings(max_examples=60, deadline=None)
def test_given_frames_are_whole_or_masked_without_loss(seed, kind, pattern, hide, t, h, w, text):
    """Compares with a plain loop over the tokens; other frames have the masks of a clip without given frames."""
    given = Given(pattern, hide)
    if BEGINS[pattern] >= t:
        return
    ids, *_ = sequence(seed, t, h, w, text, with_last=given.has_last)
    plain, *_ = sequence(seed, t, h, w, text, with_last=False)
    masked = mask_sequence(ids, CONFIG, kind=kind, generator=seeded(seed), given=given.frames, hide_given=hide)
    usual = mask_sequence(plain, CONFIG, kind=kind, generator=seeded(seed))
    assert masked.ratios == usual.ratios
    input_ids, targets = ids.clone(), torch.full_like(ids, -100)
    frames, of_plain = parse_layout(ids[None], CONFIG)[0].frames, parse_layout(plain[None], CONFIG)[0].frames
    is_code = code_mask(parse_layout(ids[None], CONFIG), len(ids))[0]
    for place, frame in enumerate(frames):
        is_given = place < {"none": 0, "first": 1, "prediction": 2, "ends": 2}[pattern]
        twin = of_plain[place - (given.has_last and place > 1)]
        for offset in range(frame.end - frame.start):
            at = frame.start + offset
            if is_given:
                if hide and is_code[at]:
                    input_ids[at] = CONFIG.mask_token_id
            else:
                input_ids[at], targets[at] = usual.input_ids[twin.start + offset], usual.targets[twin.start + offset]
    assert torch.equal(masked.input_ids, input_ids)
    assert torch.equal(masked.targets, targets)


def test_patterns_are_drawn_by_share_and_dropout():
    shares = {"none": 0.5, "first": 0.2, "prediction": 0.1, "ends": 0.2}

    def drawn(number: int, frames: int = 5, dropout: float = 0.25) -> Given:
        return drawn_given(lambda purpose: seeded(number * 2 + (purpose == "pattern")), shares, dropout, frames)

    found = [drawn(number) for number in range(4000)]
    for name, share in shares.items():
        of_pattern = [given for given in found if given.pattern == name]
        assert len(of_pattern) / 4000 == pytest.approx(share, abs=0.04)
        dropped = sum(given.is_dropped for given in of_pattern) / len(of_pattern)
        assert dropped == pytest.approx(0.25 if name != "none" else 0, abs=0.07)
    assert {given.pattern for given in (drawn(n, frames=2) for n in range(200))} == {"none", "first", "ends"}
    assert {drawn(n, frames=1) for n in range(200)} == {Given("none", False)}
    assert not any(drawn(n, dropout=0.0).is_dropped for n in range(200))
    assert trained_patterns(shares | {"first": 0.0}) == ["none", "prediction", "ends"]


def test_steps_back_lead_to_the_frame_before_in_time():
    (plain,), (ends,) = (parse_layout(sequence(0, 3, 2, 2, with_last=last)[0][None], CONFIG) for last in (False, True))
    span = plain.frames[0].end - plain.frames[0].start
    assert steps_back(plain) == [0, span, span]
    assert steps_back(ends) == [0, 0, 2 * span + 1, span]


@over(st.lists(st.none() | st.integers(0, 6), min_size=1, max_size=3), st.integers(2, 4), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_cached_logits_equal_those_of_the_whole_sequence(texts, t, seed):
    """Each cached step of frames between the first and the last equals one plain forward pass over the whole sequence."""
    g = seeded(seed)
    first, last = torch.randint(0, 64, (1, 2, 3), generator=g), torch.randint(0, 64, (2, 3), generator=g)
    given = [build_frames(first, CONFIG)[0], build_last(last, t - 1, CONFIG)]
    sequences = [
        torch.cat([torch.tensor(build_prefix(None if n is None else [600] * n, fps=8, duration=1, config=CONFIG)), *given])
        for n in texts
    ]
    span = len(given[0])
    engine = DecodingEngine(MODEL)
    engine.prefill(sequences, max(map(len, sequences)) + (t - 1) * span)
    for _ in range(1, t):
        ids = torch.stack([build_frames(torch.randint(-1, 64, (1, 2, 3), generator=g), CONFIG)[0] for _ in texts])
        logits = engine.denoise(ids)
        sequences = [torch.cat([s, i]) for s, i in zip(sequences, ids, strict=True)]
        for r, whole in enumerate(sequences):
            with torch.no_grad():
                full = MODEL(whole[None]).logits[0, -span:][3:-1].view(2, 4, -1)[:, :3, CONFIG.visual_token_start :]
            torch.testing.assert_close(logits[r], full.flatten(0, 1), atol=2e-4, rtol=1e-4)
        engine.commit(ids)
    assert engine.frames_done == t


def test_rows_at_other_times_and_bounded_histories_are_refused():
    first, last = build_frames(torch.zeros(1, 2, 3, dtype=torch.long), CONFIG)[0], torch.zeros(2, 3, dtype=torch.long)
    head = torch.tensor(build_prefix(None, fps=8, duration=1, config=CONFIG))
    ends = [torch.cat([head, first, build_last(last, time, CONFIG)]) for time in (2, 3)]
    with pytest.raises(ValueError, match="or at different times"):
        DecodingEngine(MODEL).prefill(ends, 100)
    with pytest.raises(ValueError, match="a bounded history does not work with a frame whose time is stated"):
        DecodingEngine(MODEL).prefill(ends[:1], 100, history=1)


def test_configs_know_their_patterns():
    assert micro_config().patterns == ["none"]
    assert micro_config(patterns=["first", "ends"]).patterns == ["first", "ends"]
    with pytest.raises(ValueError, match=r"patterns \['views'\] is not allowed; give some of none, first, prediction, ends"):
        micro_config(patterns=["views"])


def test_costs_count_the_last_picture_and_what_is_given():
    """Compares with layouts of real sequences; expected FLOPs and losses are means over the patterns."""
    shares = {"none": 1, "first": 1, "prediction": 1, "ends": 1}
    cost, plain = (LumosTrainingCost.of(CONFIG, text_tokens=3, **more) for more in ({"patterns": shares}, {}))
    with_last, without = (parse_layout(sequence(0, 4, 2, 3, with_last=last)[0][None], CONFIG)[0] for last in (True, False))
    longest = cost.sequence(13, 16, 24)
    assert longest == with_last
    assert plain.sequence(13, 16, 24) == without_last(longest) == without
    assert cost.sequence(1, 16, 24) == plain.sequence(1, 16, 24)
    assert cost.supervised(longest) == pytest.approx(plain.supervised(without) * (4 + 3 + 2 + 3) / 16)
    assert cost.training_flops(longest, 10) == pytest.approx(
        training_flops(CONFIG, with_last, 10) / 4 + training_flops(CONFIG, without, 10) * 3 / 4
    )
