from __future__ import annotations

import pytest
import torch
from conftest import micro_config
from hypothesis import given, settings
from hypothesis import strategies as st

from lumos import LumosForVideoGeneration
from lumos.generation.engine import Engine, generate_frames
from lumos.generation.settings import GenerationSettings
from lumos.masking import history_mask
from lumos.sequence import build_frames, build_prefix

CONFIG = micro_config()
torch.manual_seed(0)
MODEL = LumosForVideoGeneration(CONFIG).eval()
with torch.no_grad():  # random weights of the usual size give nearly flat distributions
    MODEL.lm_head.weight.mul_(30)
GRID = (2, 3)


def prefix(text, given=None):
    ids = torch.tensor(build_prefix(text, fps=8, duration=1, config=CONFIG))
    return ids if given is None else torch.cat([ids, build_frames(given, CONFIG).flatten()])


def run(conditional, unconditional, seeds, new_frames=3, on_step=lambda *_: None, **options):
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, **options}
    frames = generate_frames(
        MODEL, conditional, unconditional, grid=GRID, new_frames=new_frames, settings=GenerationSettings(**options),
        generators=[torch.Generator().manual_seed(s) for s in seeds], on_step=on_step,
    )  # fmt: skip
    return torch.stack(list(frames), dim=1)


rows = st.lists(st.none() | st.integers(0, 6), min_size=1, max_size=4)


@given(rows, st.integers(1, 3), st.integers(0, 2), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_cached_logits_equal_those_of_the_whole_sequence(texts, frames, given_frames, seed):
    """Every denoise call, against one plain forward over prefix, committed frames and the current one."""
    g = torch.Generator().manual_seed(seed)
    given_codes = torch.randint(0, 64, (given_frames, *GRID), generator=g) if given_frames else None
    sequences = [prefix(None if n is None else [600 + i for i in range(n)], given_codes) for n in texts]
    engine = Engine(MODEL)
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
    engine = Engine(MODEL)
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


def test_seeds_decide():
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
    assert set(seen) == {2}


def test_forwards_are_counted_and_the_last_frame_is_not_committed(monkeypatch):
    calls = []
    forward = MODEL.model.forward
    monkeypatch.setattr(MODEL.model, "forward", lambda ids, *a: calls.append(1) or forward(ids, *a))
    run([prefix([600])], [prefix(None)], seeds=[1], new_frames=4, num_inference_steps=5)
    assert len(calls) == 1 + 4 * 5 + 3


@pytest.mark.parametrize("mask_given", [False, True])
def test_history_enters_the_cache_with_its_periodic_mask(monkeypatch, mask_given):
    """Generated frames are partly hidden; given frames are whole unless asked otherwise (the release ignores its setting)."""
    fed, committed = [], []
    forward, commit = MODEL.model.forward, Engine.commit
    monkeypatch.setattr(MODEL.model, "forward", lambda ids, *a: fed.append(ids) or forward(ids, *a))
    monkeypatch.setattr(Engine, "commit", lambda self, ids: committed.append(ids) or commit(self, ids))
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


def test_temperature_is_annealed_within_each_frame_and_reset(monkeypatch):
    """T0 (1 - (step + 1) / steps) in every frame; the release lets it collapse to 0 after the first."""
    import lumos.generation.engine as engine

    used = []
    original = engine.least_confident
    monkeypatch.setattr(engine, "least_confident", lambda lp, u, t, n: used.append(t) or original(lp, u, t, n))
    run([prefix([600])], [prefix(None)], seeds=[1], new_frames=2, num_inference_steps=4, temperature=2.0)
    assert used == pytest.approx([1.5, 1.0, 0.5, 0.0] * 2)


def test_steps_unmask_on_schedule_and_report():
    steps, masked = [], []
    original = Engine.denoise

    def denoise(self, ids, at=None):
        masked.append(int((ids[0] == CONFIG.mask_token_id).sum()))
        assert at.shape == (len(ids), masked[-1])
        return original(self, ids, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "denoise", denoise)
        run([prefix([600])], [prefix(None)], [1], new_frames=2, on_step=lambda frame, step, ids: steps.append((frame, step)))
    assert masked == [6, 5, 3] * 2
    assert steps == [(f, s) for f in range(2) for s in range(3)]


def test_rows_with_different_numbers_of_given_frames_are_refused():
    with pytest.raises(ValueError, match="different numbers of given frames"):
        Engine(MODEL).prefill([prefix([600]), prefix(None, torch.zeros(1, *GRID, dtype=torch.long))], 60)
