from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import micro_config
from torch.utils._python_dispatch import TorchDispatchMode

from lumos import LumosForVideoGeneration
from lumos.models.lumos1.cache import PrefixCache
from lumos.models.lumos1.engine import DecodingEngine
from lumos.models.lumos1.masking import history_mask
from lumos.models.lumos1.sampling import decide, draw_uniform, generate_frames
from lumos.models.lumos1.sequence import build_frames, build_prefix
from lumos.models.lumos1.settings import GenerationSettings

CONFIG = micro_config()
torch.manual_seed(0)
MODEL = LumosForVideoGeneration(CONFIG).eval()
with torch.no_grad():  # random weights of the usual size give nearly flat distributions
    MODEL.lm_head.weight.mul_(30)
GRID = (2, 3)


def prefix(text, given=None):
    ids = torch.tensor(build_prefix(text, fps=8, duration=1, config=CONFIG))
    return ids if given is None else torch.cat([ids, build_frames(given, CONFIG).flatten()])


def run(conditional, unconditional, seeds, new_frames=3, on_step=lambda *_: None, prefix_cache=None, **options):
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, **options}
    frames = generate_frames(
        MODEL, conditional, unconditional, grid=GRID, new_frames=new_frames, settings=GenerationSettings(**options),
        generators=[torch.Generator().manual_seed(s) for s in seeds], on_step=on_step, prefix_cache=prefix_cache,
    )  # fmt: skip
    return torch.stack(list(frames), dim=1)


rows = st.lists(st.none() | st.integers(0, 6), min_size=1, max_size=4)


@pytest.mark.slow
@given(rows, st.integers(1, 3), st.integers(0, 2), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_cached_logits_equal_those_of_the_whole_sequence(texts, frames, given_frames, seed):
    """Compares every denoising call with one forward pass over the prefix, the committed frames and the current frame."""
    g = torch.Generator().manual_seed(seed)
    given_codes = torch.randint(0, 64, (given_frames, *GRID), generator=g) if given_frames else None
    sequences = [prefix(None if n is None else [600 + i for i in range(n)], given_codes) for n in texts]
    engine = DecodingEngine(MODEL)
    span = build_frames(torch.zeros(1, *GRID, dtype=torch.long), CONFIG).shape[1]
    engine.prefill(sequences, max(map(len, sequences)) + frames * span)
    for _ in range(frames):
        codes = torch.randint(-1, 64, (len(texts), *GRID), generator=g)
        ids = torch.stack([build_frames(c[None], CONFIG)[0] for c in codes])
        logits = engine.denoise(ids)
        for r in range(len(texts)):
            whole = torch.cat([sequences[r], ids[r]])
            with torch.no_grad():
                full = MODEL(whole[None]).logits[0, -span:]
            is_code = torch.ones(GRID[0], GRID[1] + 1, dtype=torch.bool)
            is_code[:, -1] = False
            visual = full[3:-1][is_code.flatten()][:, CONFIG.visual_token_start :]
            torch.testing.assert_close(logits[r], visual, atol=2e-4, rtol=1e-4)
        engine.commit(ids)
        sequences = [torch.cat([s, i]) for s, i in zip(sequences, ids, strict=True)]


def test_logits_can_be_asked_for_at_some_positions():
    engine = DecodingEngine(MODEL)
    engine.prefill([prefix([600]), prefix(None)], 60)
    ids = build_frames(torch.full((1, *GRID), -1), CONFIG).repeat(2, 1)
    everywhere = engine.denoise(ids)
    some = engine.denoise(ids, at=torch.tensor([[3, 8], [4, 7]]))
    torch.testing.assert_close(some[0], everywhere[0][[0, 4]])
    torch.testing.assert_close(some[1], everywhere[1][[1, 3]])


def test_a_clip_does_not_depend_on_its_batch():
    conditional = [prefix([600, 601]), prefix([602]), prefix([603, 604, 605])]
    together = run(conditional, [prefix(None)] * 3, seeds=[5, 6, 7])
    for i, seed in enumerate((5, 6, 7)):
        assert torch.equal(run(conditional[i : i + 1], [prefix(None)], seeds=[seed])[0], together[i])


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"history_frames": 1}, {"guidance_interval": (0.0, 0.5)}])
def test_rows_too_large_together_go_one_by_one(monkeypatch, rows, options):
    """The allowed bytes of hidden states limit the rows of a forward pass, to one at least; the codes stay the same."""
    sizes, forward = [], MODEL.model.forward
    args = [prefix([600, 601]), prefix([602]), prefix([603, 604, 605])], [prefix(None)] * 3, [5, 6, 7]
    together = run(*args, new_frames=5, **options)
    span = len(build_frames(torch.full((1, *GRID), -1), CONFIG)[0])
    monkeypatch.setattr("lumos.models.lumos1.engine.STATES_BYTES", rows * 2 * span * CONFIG.hidden_size * MODEL.dtype.itemsize)
    monkeypatch.setattr(MODEL.model, "forward", lambda ids, *a: sizes.append(ids.shape) or forward(ids, *a))
    assert torch.equal(run(*args, new_frames=5, **options), together)
    assert max(shape[0] for shape in sizes if shape[1] == 2 * span) == rows


def test_rows_of_an_offloaded_decoder_run_in_one_batch(monkeypatch):
    """With offloaded layers, each forward pass loads every layer again."""
    rows, forward = [], MODEL.model.forward
    monkeypatch.setattr("lumos.models.lumos1.engine.STATES_BYTES", 1)
    monkeypatch.setattr("lumos.models.lumos1.engine.is_spread", lambda model: True)
    monkeypatch.setattr(MODEL.model, "forward", lambda ids, *a: rows.append(len(ids)) or forward(ids, *a))
    run([prefix([600])], [prefix(None)], seeds=[1])
    assert rows == [1, 1] + [2] * 9


def test_a_seed_determines_the_codes():
    args = ([prefix([600])], [prefix(None)])
    assert torch.equal(run(*args, seeds=[1]), run(*args, seeds=[1]))
    assert not torch.equal(run(*args, seeds=[1]), run(*args, seeds=[2]))


def test_guidance_one_runs_one_branch(monkeypatch):
    seen = []
    forward = MODEL.model.forward
    monkeypatch.setattr(MODEL.model, "forward", lambda ids, *a: seen.append(len(ids)) or forward(ids, *a))
    run([prefix([600])], None, seeds=[1], guidance_scale=1.0)
    assert set(seen) == {1}
    seen.clear()
    run([prefix([600])], [prefix(None)], seeds=[1])
    assert seen == [1, 1] + [2] * 9  # two prefixes of different lengths, then steps


def test_forwards_include_no_commit_of_the_last_frame(monkeypatch):
    calls = []
    forward = MODEL.model.forward
    monkeypatch.setattr(MODEL.model, "forward", lambda ids, *a: calls.append(1) or forward(ids, *a))
    run([prefix([600])], [prefix(None)], seeds=[1], new_frames=4, num_inference_steps=5)
    assert len(calls) == 2 + 4 * 5  # commits are part of the steps


@pytest.mark.parametrize("mask_given", [False, True])
def test_history_enters_the_cache_with_its_periodic_mask(monkeypatch, mask_given):
    """Generated frames are partly hidden; given frames are whole unless asked otherwise (the release ignores its setting)."""
    fed, committed = [], []
    forward, hidden = MODEL.model.forward, DecodingEngine.hidden
    monkeypatch.setattr(MODEL.model, "forward", lambda ids, *a: fed.append(ids) or forward(ids, *a))

    def watched(self, ids, at, committing=None, only=None):
        committed.extend([] if committing is None else [committing])
        return hidden(self, ids, at, committing, only)

    monkeypatch.setattr(DecodingEngine, "hidden", watched)
    given = torch.zeros(1, *GRID, dtype=torch.long)
    options = {"history_mask_ratio": 0.5, "mask_given_frames": mask_given}
    codes = run([prefix([600], given)], [prefix(None, given)], [1], **options)
    expected = history_mask(GRID[0] * (GRID[1] + 1), 0.5)
    given_content = fed[0][0, -(len(expected) + 1) : -1]
    assert torch.equal(given_content == CONFIG.mask_token_id, expected & mask_given)
    assert len(committed) == 2
    for frame, ids in enumerate(committed):
        content = ids[:, 3:-1]
        assert torch.equal(content == CONFIG.mask_token_id, expected.expand_as(content))
        whole = build_frames(codes[0, frame : frame + 1], CONFIG)[0, 3:-1]
        assert torch.equal(content[0][~expected], whole[~expected])


@pytest.mark.parametrize("given", [None, torch.zeros(1, *GRID, dtype=torch.long)])
def test_a_commit_inside_a_step_is_a_commit_before_it(monkeypatch, given):
    """Codes and logits equal those of an engine that appends a finished frame by a separate forward pass."""
    conditional, unconditional = [prefix([600, 601], given), prefix([602], given)], [prefix(None, given)] * 2
    fused = [run(conditional, unconditional, seeds=[s, s + 1]) for s in range(4)]
    hidden, largest = DecodingEngine.hidden, []

    def apart(self, ids, at, committing=None, only=None):
        if committing is None:
            return hidden(self, ids, at)
        inside = copy.deepcopy(self.cache), self.frames_done, self._lengths
        together = hidden(self, ids, at, committing)
        self.cache, self.frames_done, self._lengths = inside
        self.commit(committing)
        after = hidden(self, ids, at)
        largest.append(float((after - together).abs().max()))
        return after

    monkeypatch.setattr(DecodingEngine, "hidden", apart)
    for s, codes in enumerate(fused):
        assert torch.equal(run(conditional, unconditional, seeds=[s, s + 1]), codes)
    assert len(largest) == 4 * 2
    assert max(largest) < 1e-5


def test_equal_prefixes_are_computed_once_and_the_last_is_kept(monkeypatch):
    """A cached prefix gives the same codes, and is computed again for other ids or changed weights."""
    fed, forward, prefix_cache = [], MODEL.model.forward, PrefixCache()
    monkeypatch.setattr(MODEL.model, "forward", lambda ids, *a: fed.append(ids) or forward(ids, *a))

    def prefilled(unconditional=None, **options):
        fed.clear()
        branches = [prefix([600]), prefix([601])], [prefix(unconditional)] * 2
        codes = run(*branches, [1, 2], new_frames=1, prefix_cache=prefix_cache, **options)
        return codes, [tuple(ids.shape) for ids in fed[:-3]]

    length = len(prefix(None))
    codes, first = prefilled()
    assert first == [(2, length + 3), (1, length)]
    again, second = prefilled()
    assert second == [(2, length + 3)]
    assert torch.equal(codes, again)
    assert len(prefilled([603])[1]) == 1  # it is as long as the others: one batch of three
    assert fed[0].shape == (3, length + 3)
    prefilled()
    weight = MODEL.model.layers[0].self_attn.v_proj.weight
    with torch.no_grad():
        weight.mul_(2)
    changed, computed = prefilled()
    with torch.no_grad():
        weight.mul_(0.5)
    assert len(computed) == 2
    assert not torch.equal(changed, codes)
    assert torch.equal(prefilled()[0], codes)


def test_inference_mode_weights_get_no_prefix_cache():
    prefix_cache, ids = PrefixCache(), prefix(None)
    with torch.inference_mode():
        uncounted = copy.deepcopy(MODEL)
    for model, found in ((MODEL, True), (uncounted, False)):
        prefix_cache.save(model, ids, (ids, ids))
        assert (prefix_cache.load(model, ids) is not None) == found


def test_uncounted_writes_end_the_use_of_a_prefix():
    prefix_cache, ids, model = PrefixCache(), prefix(None), copy.deepcopy(MODEL)
    prefix_cache.save(model, ids, (ids, ids))
    assert prefix_cache.load(model, ids) is not None
    weight = next(model.parameters())
    version = weight._version
    weight.data.mul_(1.5)  # as for averages of weights
    assert weight._version == version
    assert prefix_cache.load(model, ids) is None


def test_codes_are_decided_piece_by_piece_as_at_once(monkeypatch):
    hidden = torch.randn(2, 7, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(2, 7, generator=torch.Generator().manual_seed(1))
    at_once = decide(MODEL.lm_head, hidden, uniform, GenerationSettings(top_k=9))
    rows, head = [], MODEL.lm_head.forward
    monkeypatch.setattr(MODEL.lm_head, "forward", lambda x, **k: rows.append(len(x)) or head(x, **k))
    monkeypatch.setattr("lumos.models.lumos1.sampling.LOGITS_BYTES", 3 * 4 * CONFIG.visual_token_count)
    by_piece = decide(MODEL.lm_head, hidden, uniform, GenerationSettings(top_k=9))
    assert rows == [3, 3, 3, 3, 2]
    assert torch.equal(at_once[0], by_piece[0])
    torch.testing.assert_close(at_once[1], by_piece[1])


def test_uniform_numbers_come_step_by_step():
    """One draw of random numbers for a whole frame equals one draw for each step: 2 x 6 numbers of every generator."""
    at_once = draw_uniform([torch.Generator().manual_seed(s) for s in (3, 4)], steps=5, total=6)
    for sample, seed in enumerate((3, 4)):
        generator = torch.Generator().manual_seed(seed)
        for step in range(5):
            assert torch.equal(at_once[step, :, sample], torch.rand(2, 6, generator=generator))


def test_temperature_is_annealed_within_each_frame_and_reset(monkeypatch):
    """The temperature is T0 (1 - (step + 1) / steps) in every frame; in the release it is 0 after the first frame."""
    import lumos.models.lumos1.sampling as sampling

    used = []
    original = sampling.least_confident
    monkeypatch.setattr(sampling, "least_confident", lambda lp, u, t, n: used.append(t) or original(lp, u, t, n))
    run([prefix([600])], [prefix(None)], seeds=[1], new_frames=2, num_inference_steps=4, temperature=2.0)
    assert used == pytest.approx([1.5, 1.0, 0.5, 0.0] * 2)


def test_steps_unmask_on_schedule_and_report():
    steps, masked = [], []
    original = DecodingEngine.hidden

    def hidden(self, ids, at, committing=None, only=None):
        masked.append(int((ids[0] == CONFIG.mask_token_id).sum()))
        assert at.shape == (len(ids), masked[-1])
        return original(self, ids, at, committing, only)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodingEngine, "hidden", hidden)
        run([prefix([600])], [prefix(None)], [1], new_frames=2, on_step=lambda frame, step, ids: steps.append((frame, step)))
    assert masked == [6, 5, 3] * 2
    assert steps == [(f, s) for f in range(2) for s in range(3)]


def test_rows_with_unequal_given_frames_are_refused():
    with pytest.raises(ValueError, match="different numbers of given frames"):
        DecodingEngine(MODEL).prefill([prefix([600]), prefix(None, torch.zeros(1, *GRID, dtype=torch.long))], 60)


class NoWaiting(TorchDispatchMode):
    """Refuses operations for which the host would wait for the device: scalars, and sizes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if func is torch.ops.aten.index.Tensor:  # only where an index is a mask
            reads = any(at is not None and at.dtype == torch.bool for at in args[1])
        if reads:
            raise AssertionError(f"{func} reads values")
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device():
    """The first step reads the grid from the ids. After it, only the check of each frame reads a value on the host."""
    texts = ([prefix([600, 601]), prefix([602])], [prefix(None)] * 2)

    def make(**options):
        checked = []
        with ExitStack() as watch, pytest.MonkeyPatch.context() as patch:
            patch.setattr("lumos.models.lumos1.sampling.check_finite", checked.append)

            def started(frame, step, ids):
                if (frame, step) == (0, 0):
                    watch.enter_context(NoWaiting())
                    for name in ("tolist", "cpu", "numpy", "item"):
                        patch.setattr(torch.Tensor, name, lambda self: pytest.fail("reads values"))

            run(*texts, [0, 1], on_step=started, **options)
        assert len(checked) == 3

    make()
    make(guidance_interval=(0.0, 0.5), later_steps=2, history_frames=1, top_k=20)
    with pytest.raises(AssertionError, match="reads values"):  # as docs/generate/speed.md says of this option
        make(confidence_threshold=0.5)
