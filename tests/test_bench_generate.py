"""The plain twin of the generation bench and what the bench counts. No times are judged."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lumos.benchmarks.generate as bench
from lumos.benchmarks.bound import products, profiled
from lumos.benchmarks.decoding import Case, generate, generate_plainly, logits_difference, make_case
from lumos.benchmarks.twin import plain_frames
from lumos.errors import RunError
from lumos.generation.engine import Engine


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("small", "", "", "cpu", "float32")


def test_engine_and_twin_have_the_same_logits(case):
    difference, largest = logits_difference(case)
    assert difference < 1e-5 < 0.1 < largest


def test_a_difference_ends_the_bench(case, monkeypatch):
    """An engine that puts frames one place too far is noticed, and not reported."""
    assert bench.check_logits(case, "small", "float32") < 1e-5
    right = Engine.frame_position_ids
    monkeypatch.setattr(Engine, "frame_position_ids", lambda self, *args: right(self, *args) + 1)
    with pytest.raises(RunError, match="logits of engine and twin differ"):
        bench.check_logits(case, "small", "float32")


def test_the_twin_does_what_the_release_does(case, monkeypatch):
    """Two forwards of batch one a step, the prompt only in the first; logits of all that is fed; each frame is committed."""
    fed, logits = [], []
    forward, head = case.model.model.forward, case.model.lm_head.forward
    monkeypatch.setattr(case.model.model, "forward", lambda ids, *a: fed.append(tuple(ids.shape)) or forward(ids, *a))
    monkeypatch.setattr(case.model.lm_head, "forward", lambda *a: logits.append(head(*a)) or logits[-1])
    generate_plainly(case)
    first = [(1, len(p) + case.span) for p in (case.conditional, case.unconditional)]
    assert fed == first + [(1, case.span)] * (2 * case.frames * (case.settings.num_inference_steps + 1) - 2)
    assert [tuple(x.shape) for x in logits] == [(*shape, case.model.config.vocab_size) for shape in fed]


def test_the_twin_makes_whole_frames(case):
    def frames(seed):
        return torch.cat(list(plain_frames(
            case.model, case.conditional, case.unconditional, grid=case.grid, new_frames=2, settings=case.settings, seed=seed
        )))  # fmt: skip

    codes = frames(0)
    assert codes.shape == (2, *case.grid)
    assert 0 <= int(codes.min()) <= int(codes.max()) < case.model.config.visual_token_count
    assert torch.equal(codes, frames(0))
    assert not torch.equal(codes, frames(1))


def test_shares_are_of_the_whole_time(case):
    shares = profiled(lambda: generate(case), "cpu")
    assert shares["products"] > 0
    assert shares["attention"] > 0
    assert sum(shares.values()) == pytest.approx(1, abs=0.05)


def test_flops_are_those_of_the_formula(case):
    """Two branches of 32 tokens, 3 frames of 3 steps and 2 commits; 24, 20 and 12 masked codes count in last layer and head."""
    c, parts = case.model.config, {p.part: p.flops for p in products(case)}
    assert c.num_hidden_layers == 2
    tokens, wanted = 2 * 32 * 11 + len(case.conditional) + len(case.unconditional), 2 * 3 * (24 + 20 + 12)
    assert parts["mlp.up_proj"] == 2 * (tokens + wanted) * c.hidden_size * c.intermediate_size
    assert parts["self_attn.k_proj"] == 2 * (tokens + tokens) * c.hidden_size * c.head_dim
    assert parts["head"] == wanted * c.hidden_size * c.visual_token_count
    steps = [(f, m) for f in range(3) for m in (24, 20, 12, 0)][:-1]
    pairs = sum((len(p) + 32 * (f + 1)) * (32 + m) for p in (case.conditional, case.unconditional) for f, m in steps)
    assert parts["attention scores"] == parts["attention values"] == 2 * pairs * c.hidden_size


def test_the_engine_spends_these_flops_and_no_more(case):
    """Counted by torch while it runs: the products of layers and head, and attention, where a prompt's is not counted here."""
    with FlopCounterMode(display=False) as counter:
        generate(case)
    counted = {str(name).removeprefix("aten."): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    parts = {p.part: p.flops for p in products(case)}
    attention = parts.pop("attention scores") + parts.pop("attention values")
    prompt = (len(case.conditional) + len(case.unconditional)) / (2 * 32 * 11)
    products_counted = counted["mm"] + counted.get("addmm", 0)
    assert sum(parts.values()) <= products_counted <= (1 + prompt) * sum(parts.values())
    if len(counted) > 1:
        assert attention <= sum(counted.values()) - products_counted <= (1 + prompt) * attention
