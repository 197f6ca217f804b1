"""The bench of STIV at its smallest size: its forms agree, and its counts are right. No times are judged."""

from __future__ import annotations

import argparse
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import noop_context_fn

import lumos.models.stiv.benchmarks.stiv as bench
from lumos.benchmarks import roofline
from lumos.benchmarks.measure import Bench
from lumos.benchmarks.roofline import counted_flops, recorded_products, roofline_seconds
from lumos.errors import RunError, UserError
from lumos.models.stiv.attention import SAVED
from lumos.models.stiv.benchmarks import arguments, sampling, training
from lumos.models.stiv.benchmarks.cases import SIZES, latte_of, make_case
from lumos.models.stiv.block import Block
from lumos.models.stiv.flops import forward_flops

MEASURE = Bench("cpu", "float32", threads=1, repetitions=1, peak_gflops={"float32": 50.0})


@pytest.fixture(scope="module", autouse=True)
def _short_products():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "PRODUCT_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def case():
    return make_case("micro", "cpu", "float32")


def asked(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    arguments.stiv(parser)
    return argparse.Namespace(**vars(parser.parse_args(words)), device="cpu")


# ---- products


def test_recorded_products_are_those_that_run():
    x, w, q = torch.randn(6, 4), torch.randn(5, 4), torch.randn(2, 3, 7, 8)

    def step():
        for _ in range(3):
            F.linear(x, w, torch.zeros(5))
        F.scaled_dot_product_attention(q, q[:, :, :4], q[:, :, :4])
        F.conv2d(torch.randn(2, 3, 4, 6), torch.randn(9, 3, 2, 2), stride=2)
        torch.bmm(torch.randn(2, 3, 4), torch.randn(2, 4, 5))

    products = recorded_products(step)
    found = {(p.batch, p.m, p.k, p.n): p.flops for p in products}
    assert found == {
        (1, 6, 4, 5): 3 * 2 * 6 * 4 * 5, (6, 7, 8, 4): 2 * 2 * 6 * 7 * 8 * 4,
        (1, 2 * 2 * 3, 3 * 2 * 2, 9): 2 * 12 * 12 * 9, (2, 3, 4, 5): 2 * 2 * 3 * 4 * 5,
    }  # fmt: skip
    assert [isinstance(p, roofline.AttentionProduct) for p in products] == [False, True, False, False]
    assert counted_flops(step) == sum(found.values())


def test_the_roofline_is_the_sum_over_shapes(monkeypatch):
    speeds = {5: 2.0, 9: 4.0}
    monkeypatch.setattr(roofline, "product_gflops", lambda product, device, dtype: speeds[product.n])
    products = [roofline.Product(*given) for given in (("a", 8e9, 1, 1, 1, 5), ("b", 2e9, 1, 1, 1, 9), ("c", 9e6, 1, 1, 1, 1))]
    assert roofline_seconds(products, "cpu", torch.float32) == 8 / 2 + 2 / 4  # the last one is too small to count


@pytest.mark.parametrize(("fused", "scores", "values"), [(4.0, 1.0, 2.0), (1.0, 1.0, 2.0)])
def test_attention_counts_at_its_own_best_speed(monkeypatch, fused, scores, values):
    """Attention takes the time of a fused kernel or of its two products, whichever is shorter."""
    seconds = iter((fused, scores, values))
    monkeypatch.setattr(roofline, "fastest", lambda run, device: next(seconds))
    attention = roofline.AttentionProduct("attention", 1e9, 5, 100, 100, 5000)
    assert roofline.product_gflops(attention, "cpu", torch.float32) == pytest.approx(1 / min(fused, scores + values))
    assert next(seconds, None) is None


@pytest.mark.parametrize("form", ["lumos", pytest.param("latte", marks=pytest.mark.slow)])
def test_all_flops_of_both_networks_are_in_the_roofline(case, form):
    step = sampling.lumos_step(case) if form == "lumos" else sampling.latte_step(latte_of("micro", "cpu", "float32"), case)
    assert sum(p.flops for p in recorded_products(step)) == counted_flops(step) == sampling.work_of(step, MEASURE)["flops"]


def test_flops_of_a_sampling_step_are_those_of_both_branches(case):
    of = SIZES["micro"]
    grid = case.model.config.grid(*of.latents)
    assert counted_flops(sampling.lumos_step(case)) == 2 * forward_flops(case.model.config, *grid, of.text)


@pytest.mark.slow
def test_diffusers_network_has_the_same_width_and_depth(case):
    ours, theirs = case.model.config, latte_of("micro", "cpu", "float32")
    assert (len(theirs.transformer_blocks), len(theirs.temporal_transformer_blocks)) == (ours.num_hidden_layers,) * 2
    assert theirs.proj_out.in_features == ours.hidden_size
    block = theirs.transformer_blocks[0]
    assert (block.attn1.to_q.weight.shape, block.ff.net[0].proj.out_features) == ((64, 64), 4 * 64)
    assert block.attn2.to_k.in_features == 64
    seen = []
    theirs.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0].shape, out.sample.shape)))
    assert sampling.latte_step(theirs, case)() == ()
    assert seen == [((2, 3, 4, 6, 6), (2, 3, 4, 6, 6))]


# ---- the two parts


@pytest.mark.slow
def test_sampling_figures(case):
    row, of, table = sampling.run_size("micro", MEASURE)
    assert 0 <= row["max_difference"] < 1e-4
    for form in ("lumos", "latte"):
        made = row[form]
        assert made["share_of_bound"] == pytest.approx(made["bound_seconds"] / made["seconds"], rel=1e-2)
        assert made["gflops_a_second"] == pytest.approx(made["gflops"] / made["seconds"], rel=1e-2)
    assert row["plain"]["bound_seconds"] is None
    assert row["latte"]["gflops"] > row["lumos"]["gflops"] == row["plain"]["gflops"]
    time, equal = of["latte_over_lumos_time"], of["latte_over_lumos_time_at_equal_flops"]
    assert time == pytest.approx(row["latte"]["seconds"] / row["lumos"]["seconds"], rel=1e-2)
    assert equal == pytest.approx(time * row["lumos"]["gflops"] / row["latte"]["gflops"], rel=1e-2)
    assert [len(line) for line in table] == [len(sampling.HEADERS)] * 3


@pytest.mark.slow
def test_a_wrong_form_is_not_reported(monkeypatch):
    right = Block._in_pieces
    monkeypatch.setattr("lumos.models.stiv.block.PIECE_VALUES", 64)
    assert sampling.run_size("micro", MEASURE)[0]["max_difference"] < 1e-4
    monkeypatch.setattr(Block, "_in_pieces", lambda self, x, *others: right(self, x * 1.01, *others))
    with pytest.raises(RunError, match="plain and lumos differ"):
        sampling.run_size("micro", MEASURE)


def test_training_forms_agree_and_are_compared(monkeypatch):
    megabytes = dict(zip(training.COMPARED, (40, 30, 10, 20), strict=True))
    monkeypatch.setattr(training, "run_isolated", lambda *a, **k: megabytes[a[2]["form"]] * 2**20)
    row, of, table = training.run_training("micro", ("memory", "training"), MEASURE)
    assert list(megabytes) == ["plain", "kept", "attention", "products"]
    assert 0 < row["max_difference"] < 1e-4
    assert {form: row[form]["extra_memory_mb"] for form in megabytes} == megabytes
    assert (of["products_over_plain_memory"], of["attention_over_kept_memory"]) == (0.5, 0.3333)
    assert of["kept_over_plain_time"] == pytest.approx(row["kept"]["seconds"] / row["plain"]["seconds"], rel=1e-2)
    assert of["kept_over_masked_time"] == pytest.approx(row["kept"]["seconds"] / row["masked"]["seconds"], rel=1e-2)
    assert row["masked"]["gflops_needed"] < 0.9 * row["kept"]["gflops_needed"]  # one of three blocks sees half of the places
    assert row["kept"]["gflops_needed"] == row["plain"]["gflops_needed"]
    assert [len(line) for line in table] == [8] * 6
    row, of, _ = training.run_training("micro", ("memory",), MEASURE)
    assert row["plain"]["seconds"] is row["max_difference"] is None
    assert "kept_over_masked_time" not in of


def test_a_wrong_gradient_is_not_reported(monkeypatch):
    """The bench notices checkpointing whose gradient is that of another batch."""
    monkeypatch.setattr(training, "use", lambda form, model: model.train(form != "products"))
    right = training.loss_of
    monkeypatch.setattr(training, "loss_of", lambda case, *a: right(case, *a) * (1.0 if case.model.training else 1.01))
    with pytest.raises(RunError, match="products and plain differ"):
        training.times_of("micro", MEASURE)


def test_forms_of_training_differ_in_what_they_compute_again():
    """Each form of checkpointing repeats the products of a step that it does not save."""
    case = make_case("micro", "cpu", "float32", SIZES["micro"].clips)
    case.model.train()
    of, config = SIZES["micro"], case.model.config
    data, times, keep = training.drawn_inputs(case)
    n, d = of.clips * 4 * 9, of.width

    def linears(form: str) -> Counter:
        training.use(form, case.model)
        with roofline.ProductRecorder() as recorder:
            training.loss_of(case, data, times, keep if form == "masked" else None)
            forward = recorder.counts.copy()
            recorder.counts.clear()
            torch.autograd.grad(training.loss_of(case, data, times, None), case.model.patch_in.weight)
        again = recorder.counts - forward
        return Counter({shape[1:]: count for shape, count in again.items() if shape[0] == "addmm"})

    assert linears("kept") == {}
    assert linears("products") == {(1, n, d, 4 * d): config.num_hidden_layers}
    assert linears("attention")[1, n, d, d] > 0
    assert keep.shape == (of.clips, 5)


def test_memory_of_a_step_is_measured_in_a_process_of_its_own(forks, monkeypatch):
    from types import SimpleNamespace

    from lumos.benchmarks import isolated

    monkeypatch.setattr(isolated, "subprocess", SimpleNamespace(run=lambda command, *, input, env, **_: forks.run(
        command[1:], input=input, env=env)))  # fmt: skip
    found = training.memory_of("tiny", MEASURE)
    assert list(found) == list(training.COMPARED)
    assert max(found["attention"], found["products"]) < 0.9 * found["kept"]  # these two differ by little more than repetitions do
    assert found["kept"] < 0.9 * found["plain"]
    assert found["plain"] > 2**29


# ---- settings


def test_settings_are_checked_before_anything_runs(monkeypatch):
    settings = bench.settings_from(asked("--sizes", "micro", "micro"))
    assert settings == bench.StivBenchmarkSettings(("micro",), ("sampling", "memory", "training"))
    assert bench.steps(settings, MEASURE) == 2 + 3 + 4 + 5
    assert bench.steps(bench.settings_from(asked("--sizes", "micro", "--parts", "training")), MEASURE) == 5
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="compares with diffusers, which is not installed"):
        bench.settings_from(asked())
    assert bench.settings_from(asked("--parts", "memory")).parts == ("memory",)


@pytest.mark.slow
def test_the_progress_bar_moves_as_often_as_announced(monkeypatch):
    monkeypatch.setattr(training, "run_isolated", lambda *a, **k: 2**20)
    count = [0]
    measure = Bench("cpu", "float32", 1, 2, {"float32": 50.0}, step=lambda: count.__setitem__(0, count[0] + 1))
    settings = bench.settings_from(asked("--sizes", "micro"))
    report = bench.run(settings, measure)
    assert count[0] == bench.steps(settings, measure)
    assert report.settings == {"sizes": ("micro",), "parts": ("sampling", "memory", "training")}
    assert [table[0][0] for table in report.tables] == ["sampling step", "training step"]
    assert [row["size"] for row in report.measured["sampling"]] == ["micro"]


def test_what_is_saved_has_names_of_settings():
    from lumos.models.stiv.training_settings import SAVED_OUTPUTS

    assert tuple(SAVED) == SAVED_OUTPUTS
    assert noop_context_fn not in SAVED.values()
