from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from micro import micro_config

from lumos import LumosConfig
from lumos.models.lumos1.sequence import (
    Frame,
    SequenceLayout,
    build_prefix,
    build_sequence,
    by_layout,
    clip_header,
    code_mask,
    content_mask,
    num_latent_frames,
    pad_sequences,
    parse_layout,
    parse_sequence,
    prompt_text,
    size_units,
)

CONFIG = micro_config()
PUBLISHED = LumosConfig.preset("1b")


def clip(t, h, w, seed=0, masked=False):
    codes = torch.randint(-1 if masked else 0, CONFIG.visual_token_count, (t, h, w), generator=torch.Generator().manual_seed(seed))
    return codes


texts = st.none() | st.lists(st.integers(512, 1000), max_size=9)


@given(texts, st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(1, 30), st.integers(0, 99))
def test_build_and_parse_are_inverse(text, t, h, w, duration, fps, seed):
    codes = clip(t, h, w, seed, masked=True)
    ids = build_sequence(text, codes, fps=fps, duration=duration, config=CONFIG)
    parsed = parse_sequence(ids, CONFIG)
    assert (parsed.text_ids, parsed.duration, parsed.fps) == (text, duration, fps)
    assert torch.equal(parsed.codes, codes)
    assert torch.equal(
        build_sequence(parsed.text_ids, parsed.codes, fps=parsed.fps, duration=parsed.duration, config=CONFIG), ids
    )


def test_published_layout_token_by_token():
    codes = torch.arange(2 * 4 * 8).view(2, 4, 8)
    ids = build_sequence([22807, 16758], codes, fps=12, duration=2, config=PUBLISHED).tolist()
    row = [65536 + i for i in range(8)] + [8803]
    assert ids[:8] == [0, 22807, 16758, 8710, 9004, 8806, 8816, 8197]
    assert ids[8:10] == [8805, 8806]  # height before width, in units of 32 pixels
    assert ids[10:19] == row
    assert ids[-2:] == [9005, 8710]
    assert len(ids) == 4 + 3 + 2 * (4 * 9 + 4) + 2
    assert ids.count(8803) == 8
    assert ids.count(8196) == 2


@pytest.mark.parametrize(
    ("height", "width", "content", "frame"), [(256, 448, 1824, 1828), (384, 672, 4080, 4084), (480, 768, 5820, 5824)]
)
def test_published_frame_lengths(height, width, content, frame):
    ids = build_sequence(None, torch.zeros(2, height // 8, width // 8, dtype=torch.long), fps=12, duration=2, config=PUBLISHED)
    (layout,) = parse_layout(ids[None], PUBLISHED)
    assert [f.content_length for f in layout.frames] == [content] * 2
    assert layout.frames[1].start - layout.frames[0].start == frame
    assert int(code_mask([layout], len(ids)).sum()) == 2 * height * width // 64


def test_published_prompt():
    text = prompt_text(PUBLISHED, "A cat.", height=416, width=576, num_frames=25, fps=12)
    assert text == (
        "Generate a video with a resolution of 576x416, consisting of 24 frames at 12 frames per second, "
        "according to the following prompt:\n A cat."
    )


def test_counts_of_latent_frames_and_header_numbers():
    assert [num_latent_frames(n) for n in (1, 17, 24, 25, 84)] == [1, 5, 7, 7, 22]
    assert clip_header(1, 8) == (1, 1)
    assert clip_header(25, 12) == (2, 12)
    assert clip_header(17, 8) == (2, 8)


@given(st.lists(st.tuples(texts, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4))
def test_layout_of_a_padded_batch_is_that_of_each_row(rows):
    sequences = [build_sequence(x, clip(t, h, w), fps=8, duration=1, config=CONFIG) for x, t, h, w in rows]
    batch = parse_layout(pad_sequences(sequences, CONFIG.pad_token_id), CONFIG)
    assert batch == [parse_layout(s[None], CONFIG)[0] for s in sequences]
    for layout, sequence in zip(batch, sequences, strict=True):
        assert layout.length == len(sequence)
        covered = [i for start, end, _ in layout.segments for i in range(start, end)]
        assert covered == list(range(len(sequence)))


def test_masked_newlines_do_not_hide_the_rows():
    ids = build_sequence(None, clip(2, 3, 4), fps=8, duration=1, config=CONFIG)
    layout = parse_layout(ids[None], CONFIG)
    masked = ids.masked_fill(content_mask(layout, len(ids))[0], CONFIG.mask_token_id)
    assert parse_layout(masked[None], CONFIG) == layout


@pytest.mark.parametrize("cut", [1, 2, 5, 20])
def test_a_frame_cut_off_is_an_error(cut):
    ids = build_sequence([600], clip(1, 4, 4), fps=8, duration=1, config=CONFIG)
    at = ids.tolist().index(CONFIG.frame_start_token_id)
    with pytest.raises(ValueError, match="frame 0 of sample 0"):
        parse_layout(ids[None, : at + cut], CONFIG)


def test_errors_say_what_is_allowed():
    with pytest.raises(ValueError, match="height 30 is not a multiple of 8; the nearest sizes are 24 and 32"):
        size_units(30, "height", CONFIG)
    with pytest.raises(ValueError, match="fps 500 has no number token"):
        build_prefix(None, fps=500, duration=1, config=CONFIG)
    with pytest.raises(ValueError, match="allowed: 0 to 63"):
        build_sequence(None, torch.full((1, 1, 1), 64), fps=1, duration=1, config=CONFIG)
    a, b = (build_sequence(None, clip(1, s, s), fps=1, duration=1, config=CONFIG) for s in (2, 3))
    with pytest.raises(ValueError, match="frames of different sizes"):
        parse_sequence(torch.cat([a[:-2], b[3:]]), CONFIG)


@pytest.mark.parametrize("place", ["newline", "code", "tail", "duration", "after header", "cut tail"])
def test_what_leaves_the_grammar_is_refused(place):
    ids = build_sequence([600, 601], clip(2, 2, 3), fps=8, duration=1, config=CONFIG)
    first = parse_layout(ids[None], CONFIG)[0].frames[0]
    at = {"newline": first.content_start + 3, "code": first.content_start, "tail": len(ids) - 1, "duration": 5}
    if place == "after header":
        ids = torch.cat([ids[: first.start], ids.new_tensor([600]), ids[first.start :]])
    elif place == "cut tail":
        ids = ids[:-1]
    else:
        ids[at[place]] = 700
    with pytest.raises(ValueError):
        parse_sequence(ids, CONFIG)


def test_text_ids_of_another_tokenizer_are_refused():
    for wrong in (CONFIG.video_start_token_id, CONFIG.number_token_start, CONFIG.visual_token_start + 3):
        with pytest.raises(ValueError, match="the wrong text tokenizer"):
            build_prefix([600, wrong], fps=8, duration=1, config=CONFIG)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_token_id": 2}, "must have different ids"),
        ({"mask_token_id": 99_999}, "mask token has id 99999"),
        ({"mask_token_id": 1024}, "a visual code"),
        ({"number_token_count": 5000}, "last number token"),
        ({"sep_token_id": 9}, "lie among the number tokens"),
        ({"rope_theta": 0.0}, "rope_theta 0.0 is not allowed; give a number above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 is not allowed; give a whole number from 1"),
        ({"prompt_template": "{prompt} {foo}"}, "is not usable"),
        ({"prompt_template": "no place"}, "has no {prompt} in it"),
        ({"hiden_size": 64}, "did you mean 'hidden_size'"),
        ({"position_scheme": "2d"}, "allowed: mm_rope"),
        ({"visual_token_count": 5000}, "do not fit into vocab_size"),
    ],
)
def test_configs_that_cannot_work(fields, message):
    with pytest.raises(ValueError, match=message):
        micro_config(**fields)


def test_rows_of_equal_layouts_are_made_once():
    one, other = (SequenceLayout(9, (Frame(start, 1, 1),)) for start in (0, 2))
    twin = SequenceLayout(9, (Frame(0, 1, 1),))
    asked = []

    def make(layout: SequenceLayout) -> torch.Tensor:
        asked.append(layout)
        return torch.tensor([layout.frames[0].start, layout.length])

    assert by_layout([one, other, one, one], make).tolist() == [[0, 9], [2, 9], [0, 9], [0, 9]]
    assert asked == [one, other]
    assert by_layout([one, twin], make).tolist() == [[0, 9], [0, 9]]
    rows = [build_sequence(None, clip(n, 1, 1), fps=8, duration=1, config=CONFIG) for n in (2, 1, 2)]
    first, second, third = parse_layout(pad_sequences(rows, CONFIG.pad_token_id), CONFIG)
    assert first is third
    assert second != first


def test_padding_to_a_multiple():
    rows = [torch.ones(5), torch.ones(3)]
    assert pad_sequences(rows, 0).shape == pad_sequences(rows, 0, 5).shape == (2, 5)
    padded = pad_sequences(rows, 7, 4)
    assert padded.tolist() == [[1] * 5 + [7] * 3, [1] * 3 + [7] * 5]
    assert pad_sequences([row.bool() for row in rows], False, 4).dtype == torch.bool


def test_reserved_ids_are_all_that_are_reserved():
    for end in (0, 5, CONFIG.number_token_start + 3, CONFIG.visual_token_start + 1, CONFIG.vocab_size):
        assert CONFIG.reserved_ids(end) == [i for i in range(end) if CONFIG.is_reserved(i)]
