"""Settings that trade quality for time or memory, compared with a plain form: one sample, no cache, whole sequences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import micro_config

from lumos import LumosForVideoGeneration
from lumos.errors import UserError
from lumos.models.lumos1.attention import dense_attention, dense_mask
from lumos.models.lumos1.engine import DecodingEngine, cache_tokens, code_offsets
from lumos.models.lumos1.history_thinning import leaving
from lumos.models.lumos1.masking import history_mask, unmasking_counts
from lumos.models.lumos1.rope import position_ids
from lumos.models.lumos1.sampling import generate_frames, gumbel, sample_codes
from lumos.models.lumos1.sequence import Frame, build_frames, build_prefix, content_mask, parse_layout
from lumos.models.lumos1.settings import GenerationSettings

CONFIG = micro_config()
torch.manual_seed(0)
MODEL = LumosForVideoGeneration(CONFIG).eval()
with torch.no_grad():
    MODEL.lm_head.weight.mul_(30)
GRID = (2, 3)
SPAN = build_frames(torch.zeros(1, *GRID, dtype=torch.long), CONFIG).shape[1]


def prefix(text, codes=None):
    ids = torch.tensor(build_prefix(text, fps=8, duration=1, config=CONFIG))
    return ids if codes is None else torch.cat([ids, build_frames(codes, CONFIG).flatten()])


def run(conditional, unconditional, seeds, new_frames, options, on_step=lambda *_: None, later=None, without_given=None):
    frames = generate_frames(
        MODEL, conditional, unconditional, without_given=without_given, grid=GRID, new_frames=new_frames, settings=options,
        generators=[torch.Generator().manual_seed(s) for s in seeds], on_step=on_step, later=later,
    )  # fmt: skip
    return torch.stack(list(frames), dim=1)


def plain_mask(layout, history, thinning=False):
    """Return the mask, bool [L, L]: tokens of a frame see the text, the first frame, `history` frames before theirs, and theirs.

    thinning: the frames that stay by the rule of `leaving`, instead of those right before them.
    """
    allowed, stay = dense_mask([layout], layout.length)[0], set()
    for i, later in enumerate(layout.frames):
        for j, earlier in enumerate(layout.frames):
            seen = j in stay if thinning else history is None or i - j <= history
            if 1 <= j < i and not seen:
                allowed[later.start : later.end, earlier.start : earlier.end] = False
        if thinning and len(stay) == history:
            stay.remove(leaving(sorted(stay), i))
        stay |= {i} - {0}
    return allowed


class Remembered:
    """The keys and values of a frame's tokens in every layer, from the last step in which each token was computed."""

    def __init__(self):
        self.of_layer = {}

    def mixed(self, layer, runs, k, v):
        """k, v [1, Hkv, L, D] of a sequence that ends with the frame, with those remembered where `runs`, bool [n], is False."""
        for kind, new in (("k", k), ("v", v)):
            old = self.of_layer.get((layer, kind), new[:, :, -SPAN:])
            frame = torch.where(runs[:, None], new[:, :, -SPAN:], old)
            self.of_layer[layer, kind] = frame
            new = torch.cat([new[:, :, :-SPAN], frame], dim=2)
            k, v = (new, v) if kind == "k" else (k, new)
        return k, v


@torch.no_grad()
def plain_logits(sequence, history, thinning=False, remembered=None, runs=None):
    """Return visual logits [6, K] of the codes of the last frame, by one forward pass over the whole sequence.

    runs: bool [SPAN], the tokens of the frame that are computed; others have the keys and values in `remembered`.
    """
    (layout,) = parse_layout(sequence[None], CONFIG)
    mask = plain_mask(layout, history, thinning)[None, None]
    rotary = MODEL.rotary(position_ids([layout], layout.length, CONFIG), content_mask([layout], layout.length))

    def attend(layer, q, k, v):
        k, v = (k, v) if remembered is None else remembered.mixed(layer, runs, k, v)
        return dense_attention(q, k, v, mask)

    hidden = MODEL.model(sequence[None], rotary, attend)[0, -SPAN:]
    content = hidden[3:-1].view(GRID[0], GRID[1] + 1, -1)[:, :-1].flatten(0, 1)
    return MODEL.lm_head(content)[:, CONFIG.visual_token_start :]


@torch.no_grad()
def plain_keys_and_values(sequence, history, thinning):
    """Return the keys and values of the whole sequence, [layers, Hkv, L, D] each."""
    (layout,) = parse_layout(sequence[None], CONFIG)
    mask, found = plain_mask(layout, history, thinning)[None, None], []
    rotary = MODEL.rotary(position_ids([layout], layout.length, CONFIG), content_mask([layout], layout.length))
    MODEL.model(sequence[None], rotary, lambda layer, q, k, v: found.append((k[0], v[0])) or dense_attention(q, k, v, mask))
    return [torch.stack(of) for of in zip(*found, strict=True)]


def plain_clip(conditional, unconditional, seed, new_frames, options, later=None, nothing=None):
    """(codes [t, h, w], steps taken in each frame) of one clip; later: new frame -> prefix that it and those after it read.

    nothing: the prefix of the branch without given frames.
    """
    generator, total = torch.Generator().manual_seed(seed), GRID[0] * GRID[1]
    hidden_later = history_mask(GRID[0] * (GRID[1] + 1), options.history_mask_ratio)
    made, taken, done = [], [], []
    for frame in range(new_frames):
        if later and frame in later:
            conditional = torch.cat([later[frame], *done])
        codes = torch.full((total,), -1)
        n = options.num_inference_steps if frame == 0 or options.later_steps is None else options.later_steps
        counts = [total, *unmasking_counts(total, n)]
        numbers = torch.rand(n, 2, total, generator=generator)
        taken.append(0)
        code_of_token = build_frames(torch.arange(total).view(1, *GRID), CONFIG).flatten() - CONFIG.visual_token_start
        memories, was_masked, was_guided = [Remembered() for _ in range(3)], None, True
        for step in range(n):
            start, stop = options.guidance_interval
            guided = unconditional is not None and start <= step / n < stop
            runs = torch.ones(SPAN, dtype=torch.bool)
            if step % options.step_reuse and not (guided and not was_guided):
                runs = torch.tensor([code in was_masked for code in code_of_token.tolist()])
            was_masked, was_guided = {i for i in range(total) if codes[i] < 0}, guided
            current = build_frames(codes.view(1, *GRID), CONFIG).flatten()
            bound = options.history_frames, options.history_thinning
            logits = plain_logits(torch.cat([conditional, current]), *bound, memories[0], runs)
            if guided:
                without = plain_logits(torch.cat([unconditional, current]), *bound, memories[1], runs)
                text = options.guidance_scale * (logits - without)
                if nothing is not None:
                    least = plain_logits(torch.cat([nothing, current]), *bound, memories[2], runs)
                    without = least + options.image_guidance_scale * (without - least)
                logits = without + text
            masked = [i for i in range(total) if codes[i] < 0]
            drawn, log_prob = sample_codes(logits[masked], numbers[step, 0, : len(masked)])
            temperature = options.temperature * (1 - (step + 1) / n)
            sure = log_prob + temperature * gumbel(numbers[step, 1, : len(masked)])
            order = sorted(range(len(masked)), key=lambda i: -float(sure[i]))
            decided = set(order[: counts[step] - counts[step + 1]])
            if options.confidence_threshold is not None:
                decided |= {i for i in range(len(masked)) if log_prob[i] >= math.log(options.confidence_threshold)}
            for i in decided:
                codes[masked[i]] = drawn[i]
            taken[-1] += 1
            if (codes >= 0).all():
                break
        made.append(codes.view(GRID))
        finished = build_frames(codes.view(1, *GRID), CONFIG).flatten()
        finished[3:-1][hidden_later] = CONFIG.mask_token_id
        done.append(finished)
        conditional = torch.cat([conditional, finished])
        unconditional = None if unconditional is None else torch.cat([unconditional, finished])
        nothing = None if nothing is None else torch.cat([nothing, finished])
    return torch.stack(made), taken


histories = st.just({}) | st.builds(
    lambda frames, thinning: {"history_frames": frames, "history_thinning": thinning}, st.integers(1, 3), st.booleans()
)
trades = st.builds(dict.__or__, histories, st.fixed_dictionaries({
    "guidance_interval": st.sampled_from([(0.0, 1.0), (0.0, 0.3), (0.5, 1.0), (0.25, 0.6)]),
    "confidence_threshold": st.none() | st.floats(0.05, 1.0),
    "later_steps": st.none() | st.integers(2, 4),
    "step_reuse": st.integers(1, 5),
}))  # fmt: skip


@pytest.mark.slow
@given(trades, st.integers(0, 4), st.none() | st.sampled_from([0.0, 0.5, 3.0]), st.integers(0, 99))
@settings(max_examples=16, deadline=None)
def test_combined_options_equal_the_slow_form(options, given_frames, image_scale, seed):
    """Each of two clips in a batch equals the plain form of it alone; there may be more given frames than the history holds."""
    options = GenerationSettings(num_inference_steps=4, guidance_scale=2.0, image_guidance_scale=image_scale, **options)
    g = torch.Generator().manual_seed(seed)
    begin = torch.randint(0, 64, (given_frames, *GRID), generator=g) if given_frames else None
    conditional, without = [prefix([600, 601], begin), prefix([602], begin)], prefix(None, begin)
    steps = []
    nothing = None if image_scale is None else prefix(None, None if begin is None else torch.full_like(begin, -1))
    codes = run(conditional, [without] * 2, [seed, seed + 1], 3, options, lambda frame, step, ids: steps.append(frame),
                without_given=None if nothing is None else [nothing] * 2)  # fmt: skip
    taken = []
    for sample in range(2):
        plain, counts = plain_clip(conditional[sample], without, seed + sample, 3, options, nothing=nothing)
        assert torch.equal(codes[sample], plain)
        taken.append(counts)
    assert [steps.count(frame) for frame in range(3)] == [max(of) for of in zip(*taken, strict=True)]


@pytest.mark.slow
@given(trades, st.integers(0, 3), st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_prompts_over_time_equal_the_slow_form(options, given_frames, seed):
    """Prompts change at frame 1 and at frame 3, with other lengths; each prompt reads all earlier frames again."""
    options = GenerationSettings(num_inference_steps=4, guidance_scale=2.0, **options)
    g = torch.Generator().manual_seed(seed)
    begin = torch.randint(0, 64, (given_frames, *GRID), generator=g) if given_frames else None
    without = prefix(None, begin)
    texts = {0: ([600, 601], [602]), 1: ([603], [604, 605, 606]), 3: ([602, 607], [603])}
    conditional, *later = ([prefix(list(text), begin) for text in of] for of in texts.values())
    later = dict(zip((1, 3), later, strict=True))
    codes = run(conditional, [without] * 2, [seed, seed + 1], 5, options, later=later)
    for sample in range(2):
        of_sample = {frame: rows[sample] for frame, rows in later.items()}
        plain, _ = plain_clip(conditional[sample], without, seed + sample, 5, options, of_sample)
        assert torch.equal(codes[sample], plain)


def test_another_prompt_changes_what_comes_after_it_only(monkeypatch):
    options = GenerationSettings(num_inference_steps=3, guidance_scale=4.0)
    whole = run([prefix([600])], [prefix(None)], [1], 4, options)
    capacities = []
    prefill = DecodingEngine.prefill
    monkeypatch.setattr(
        DecodingEngine, "prefill", lambda self, rows, n, *rest: capacities.append(n) or prefill(self, rows, n, *rest)
    )
    other = run([prefix([600])], [prefix(None)], [1], 4, options, later={2: [prefix([601, 602, 603, 604])]})
    assert torch.equal(other[:, :2], whole[:, :2])
    assert not torch.equal(other[:, 2:], whole[:, 2:])
    assert capacities == [cache_tokens(len(prefix([600] * 4)), SPAN, 4)] * 2  # room for the longest prompt
    same = run([prefix([600])], [prefix(None)], [1], 4, options, later={2: [prefix([600])]})
    assert torch.equal(same, whole)


@pytest.mark.parametrize(("history", "thinning"), [(None, False), (1, False), (2, False), (1, True), (2, True), (3, True)])
@pytest.mark.parametrize("fused", [False, True])
def test_logits_are_those_of_the_whole_sequence_under_the_mask(history, thinning, fused):
    """The engine gives the logits of one forward pass over the whole sequence with a dense mask."""
    g = torch.Generator().manual_seed(1)
    frames = build_frames(torch.randint(0, 64, (9, *GRID), generator=g), CONFIG)
    engine, sequence = DecodingEngine(MODEL), prefix([600, 601])
    engine.prefill([sequence], cache_tokens(len(sequence), SPAN, 9, history), history=history, thinning=thinning)
    for i, frame in enumerate(frames):
        committing = frames[i - 1 : i] if fused and i else None
        logits = engine.denoise(frame[None], committing=committing)[0]
        sequence = torch.cat([sequence, frame])
        torch.testing.assert_close(logits, plain_logits(sequence, history, thinning), atol=2e-4, rtol=1e-4)
        if not fused:
            engine.commit(frame[None])


def test_the_mask_of_the_slow_form_hides_old_frames():
    """Checks the plain form: with one frame of history, frame 3 sees text, frame 0, frame 2 and itself."""
    sequence = torch.cat([prefix([600]), build_frames(torch.zeros(4, *GRID, dtype=torch.long), CONFIG).flatten()])
    (layout,) = parse_layout(sequence[None], CONFIG)
    seen = plain_mask(layout, 1)[layout.frames[3].start]
    frames = [bool(seen[f.start : f.end].all()) for f in layout.frames]
    assert frames == [True, False, True, True]
    assert seen[: layout.frames[0].start].all()
    assert not seen[layout.frames[1].start : layout.frames[1].end].any()


def test_the_mask_of_the_slow_form_thins_the_history():
    """Checks the plain form: with two frames of history, thinned, frame 5 sees text, frames 0, 2 and 4, and itself."""
    sequence = torch.cat([prefix([600]), build_frames(torch.zeros(6, *GRID, dtype=torch.long), CONFIG).flatten()])
    (layout,) = parse_layout(sequence[None], CONFIG)
    seen = plain_mask(layout, 2, thinning=True)[layout.frames[5].start]
    assert [bool(seen[f.start : f.end].all()) for f in layout.frames] == [True, False, True, False, True, True]
    assert int(seen.sum()) == layout.frames[0].start + 4 * SPAN


@given(st.integers(1, 5), st.booleans(), st.integers(2, 14), st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_the_cache_holds_the_keys_and_values_of_the_kept_frames(history, thinning, frames, seed):
    """In two rows with texts of different lengths, keys and values equal those of a cache of all frames."""
    g = torch.Generator().manual_seed(seed)
    spans = build_frames(torch.randint(0, 64, (2 * frames, *GRID), generator=g), CONFIG).view(2, frames, SPAN)
    engine, texts = DecodingEngine(MODEL), [prefix([600, 601]), prefix([602])]
    engine.prefill(texts, cache_tokens(len(texts[0]), SPAN, frames + 1, history), history=history, thinning=thinning)
    for frame in spans.unbind(1):
        engine.commit(frame)
    kept = []
    for i in range(1, frames):
        if len(kept) == history:
            kept.remove(leaving(kept, i) if thinning else kept[0])
        kept.append(i)
    assert engine.cache.frames == [0, *kept]
    for row, text in enumerate(texts):
        sequence = torch.cat([text, *spans[row]])
        keys, values = plain_keys_and_values(sequence, history, thinning)
        begins = [len(text) + i * SPAN for i in (0, *kept)]
        at = [*range(len(text)), *(place for begin in begins for place in range(begin, begin + SPAN))]
        for ours, theirs in zip(engine.cache.read(row), (keys, values), strict=True):
            torch.testing.assert_close(ours, theirs[:, :, at], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("thinning", [False, True])
def test_memory_stays_flat_over_ten_times_the_training_length(monkeypatch, thinning):
    """A model made for 5 latent frames makes 50 with one cache, which is allocated once."""
    config = micro_config(max_position_embeddings=len(prefix([600])) + 5 * SPAN)
    torch.manual_seed(0)
    model = LumosForVideoGeneration(config).eval()
    caches, keys, elements = set(), [], []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **o: keys.append(k.shape[2]) or sdpa(q, k, v, **o))
    hidden = DecodingEngine.hidden

    def watched(self, *args):
        caches.add((self.cache.keys.data_ptr(), self.cache.values.data_ptr()))
        elements.append((self.cache.keys.numel() + self.cache.values.numel(), len(self._rotary)))
        return hidden(self, *args)

    monkeypatch.setattr(DecodingEngine, "hidden", watched)
    frames = list(generate_frames(
        model, [prefix([600])], [prefix(None)], grid=GRID, new_frames=50, generators=[torch.Generator().manual_seed(0)],
        settings=GenerationSettings(num_inference_steps=2, history_frames=3, history_thinning=thinning),
    ))  # fmt: skip
    assert len(frames) == 50
    assert len(caches) == 1
    tokens = len(prefix([600])) + 5 * SPAN  # the first frame, three of history, and the one being made
    per_token = model.kv_bytes_per_token() // 4
    assert {size for size, _ in elements} == {2 * tokens * per_token}
    assert max(rotary for _, rotary in elements) <= 2
    assert max(keys) == tokens <= config.max_position_embeddings


def test_steps_without_guidance_run_one_branch(monkeypatch):
    fed, forward = [], MODEL.model.forward
    monkeypatch.setattr(MODEL.model, "forward", lambda ids, *a: fed.append(tuple(ids.shape)) or forward(ids, *a))
    options = GenerationSettings(num_inference_steps=4, guidance_interval=(0.0, 0.5))
    run([prefix([600])], [prefix(None)], [0], 2, options)
    assert fed[2:] == [(2, SPAN), (2, SPAN), (1, SPAN), (1, SPAN), (2, 2 * SPAN), (2, SPAN), (1, SPAN), (1, SPAN)]
    fed.clear()
    run([prefix([600])], [prefix(None)], [0], 2, GenerationSettings(num_inference_steps=2, guidance_interval=(0.5, 1.0)))
    assert fed[2:] == [(1, SPAN), (2, SPAN), (2, SPAN), (1, SPAN), (2, SPAN)]  # the finished frame is committed alone


def test_steps_between_run_the_codes_that_were_masked(monkeypatch):
    """Six codes, of which 5, 4, 3, 1 and 0 stay masked; the step that begins guidance runs all tokens of both branches."""
    fed, forward = [], MODEL.model.forward
    monkeypatch.setattr(MODEL.model, "forward", lambda ids, *a: fed.append(tuple(ids.shape)) or forward(ids, *a))
    options = GenerationSettings(num_inference_steps=5, step_reuse=3)
    run([prefix([600])], [prefix(None)], [0], 1, options)
    assert fed[2:] == [(2, SPAN), (2, 6), (2, 5), (2, SPAN), (2, 3)]
    fed.clear()
    run([prefix([600])], [prefix(None)], [0], 1, replace(options, step_reuse=9, guidance_interval=(0.4, 1.0)))
    assert fed[2:] == [(1, SPAN), (1, 6), (2, SPAN), (2, 4), (2, 3)]
    fed.clear()
    run([prefix([600])], [prefix(None)], [0], 1, replace(options, step_reuse=1))
    assert fed[2:] == [(2, SPAN)] * 5


@pytest.mark.parametrize(("history", "thinning"), [(None, False), (1, False), (2, True)])
def test_logits_of_steps_between_are_those_of_the_slow_form(history, thinning):
    """Of two rows with different texts, the second has fewer codes to compute; padding does not change its result."""
    g, texts = torch.Generator().manual_seed(1), [prefix([600, 601]), prefix([602])]
    frames = torch.randint(0, 64, (2, 5, 6), generator=g)
    engine = DecodingEngine(MODEL)
    engine.prefill(texts, cache_tokens(len(texts[0]), SPAN, 5, history), history=history, thinning=thinning)
    at = code_offsets(Frame(0, *GRID))
    masked_after = [[[0, 1, 3, 4, 5], [0, 2, 5]], [[0, 3, 5], [2, 5]], [[3, 5], []]]  # of both rows
    for number in range(5):
        memories, before = [Remembered(), Remembered()], [list(range(6))] * 2
        for step, masked in enumerate([before, *masked_after]):
            hidden_codes = [torch.tensor(of, dtype=torch.int64) for of in masked]
            codes = torch.stack([row.scatter(0, m, -1) for row, m in zip(frames[:, number], hidden_codes, strict=True)])
            ids = build_frames(codes.view(2, *GRID), CONFIG)
            padded = [torch.nn.utils.rnn.pad_sequence([at[m] for m in of], batch_first=True) for of in (masked, before)]
            finished = build_frames(frames[:, number - 1].view(2, *GRID), CONFIG) if number and not step else None
            logits = engine.denoise(ids, padded[0], finished, padded[1] if step else None)
            for row in range(2):
                runs = torch.ones(SPAN, dtype=torch.bool)
                if step:
                    runs = torch.zeros(SPAN, dtype=torch.bool).index_fill(0, at[before[row]], True)
                done = build_frames(frames[row, :number].view(-1, *GRID), CONFIG).flatten()
                sequence = torch.cat([texts[row], done, ids[row]])
                plain = plain_logits(sequence, history, thinning, memories[row], runs)[masked[row]]
                torch.testing.assert_close(logits[row, : len(plain)], plain, atol=2e-4, rtol=1e-4)
                if step > 1 and len(plain):
                    assert (plain - plain_logits(sequence, history, thinning)[masked[row]]).abs().max() > 1e-2
            before = masked


def test_codes_that_a_callback_changes_are_run_again():
    """If every step changes decided codes, every step computes all tokens, as without reuse."""
    def shift(frame, step, ids):
        ids[(ids >= CONFIG.visual_token_start) & (ids < CONFIG.vocab_size - 1)] += 1

    options = GenerationSettings(num_inference_steps=6, guidance_scale=2.0)
    plain, reusing = (run([prefix([600])], [prefix(None)], [0], 2, replace(options, step_reuse=n), shift) for n in (1, 6))
    assert torch.equal(plain, reusing)
    assert not torch.equal(plain, run([prefix([600])], [prefix(None)], [0], 2, options))


def test_a_threshold_never_takes_more_steps_and_ends_early():
    def steps(threshold):
        seen = []
        options = GenerationSettings(num_inference_steps=6, confidence_threshold=threshold)
        run([prefix([600])], [prefix(None)], [0], 3, options, lambda frame, step, ids: seen.append((frame, step)))
        return len(seen)

    assert steps(None) == 18
    assert steps(1e-9) == 3
    assert steps(1e-9) < steps(0.5) <= 18


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_interval": (0.5, 0.5)}, "two numbers, 0 <= start < stop <= 1"),
        ({"guidance_interval": (0.5, 1.5)}, "two numbers"),
        ({"guidance_interval": 0.5}, "guidance_interval 0.5 is not allowed"),
        ({"guidance_interval": ("a", 1)}, "two numbers"),
        ({"guidance_interval": (0.1, 0.2), "num_inference_steps": 4}, "holds none of 4 steps"),
        ({"guidance_interval": (0.3, 0.6), "later_steps": 1}, "holds none of 1 steps"),
        ({"guidance_interval": (0.0, 0.5), "guidance_scale": 1.0}, "no effect with guidance_scale 1"),
        ({"confidence_threshold": 0.0}, "confidence_threshold 0.0 is not allowed"),
        ({"confidence_threshold": 1.1}, "at most 1"),
        ({"confidence_threshold": 0.9, "top_k": 1}, "cannot work with top_k 1"),
        ({"later_steps": 0}, "later_steps 0 is not allowed; give 1 to 1000"),
        ({"later_steps": 2.5}, "give a whole number"),
        ({"step_reuse": 0}, "step_reuse 0 is not allowed; give 1 to 1000"),
        ({"step_reuse": None}, "step_reuse None is not allowed"),
        ({"history_frames": 0}, "history_frames 0 is not allowed; give at least 1"),
        ({"history_frames": 2, "history_thinning": 1}, "history_thinning 1 is not allowed; give true or false"),
        ({"history_thinning": True}, "history_thinning has no effect without history_frames"),
    ],
)
def test_invalid_generation_settings_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        GenerationSettings(**options)


def test_lists_from_json_are_the_same_settings():
    assert GenerationSettings(guidance_interval=[0, 0.5]) == GenerationSettings(guidance_interval=(0.0, 0.5))


def test_changing_a_default_drops_options_that_depend_on_it():
    own = GenerationSettings(num_inference_steps=12, guidance_interval=(0.0, 0.5), later_steps=6)
    assert own.changed(num_inference_steps=12, temperature=0.5, guidance_scale=None) == replace(own, temperature=0.5)
    assert own.changed(num_inference_steps=4) == replace(own, num_inference_steps=4, later_steps=None)
    assert own.changed(num_inference_steps=4, later_steps=2) == replace(own, num_inference_steps=4, later_steps=2)
    assert own.changed(guidance_scale=1) == replace(own, guidance_scale=1, guidance_interval=(0.0, 1.0))
    assert own.changed(guidance_scale=5).guidance_interval == (0.0, 0.5)
    with pytest.raises(UserError, match="has no effect with guidance_scale 1"):
        own.changed(guidance_scale=1, guidance_interval=(0.0, 0.5))
    by_image = replace(own, image_guidance_scale=2.0)
    assert by_image.changed(guidance_scale=1) == replace(by_image, guidance_scale=1)  # the image still guides, in this interval
    assert by_image.for_text_alone() == own
    assert by_image.changed(guidance_scale=1).for_text_alone() == replace(own, guidance_scale=1, guidance_interval=(0.0, 1.0))
