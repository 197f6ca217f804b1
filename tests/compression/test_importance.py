"""Scores against plain forms of their formulas, and planted truths that every measure must find."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import codes, decoder, lumos_folder, stiv_folder, tokenizer, transformer

from lumos import registry
from lumos.compression import importance
from lumos.compression.decoder_probe import DecoderProbe
from lumos.compression.gates import GateSettings, gated, learned_gates
from lumos.compression.history import history_gains
from lumos.compression.importance import MEASURES, WHOLE, direction_change, score, split
from lumos.compression.plans import removed_by
from lumos.compression.trace import Trace
from lumos.data.curriculum import StepShape
from lumos.data.seeding import VALIDATION_STEP
from lumos.errors import UserError
from lumos.training.settings import build_settings
from lumos.training.task import IGNORED

SIZES = {"lumos1": {"height": 16, "width": 24}, "stiv": {"height": 16, "width": 32}}


def made(generator: str, folder, **sections) -> SimpleNamespace:
    """The task, the network, and two micro-batches of two clips."""
    settings = build_settings({
        "generator": generator, "model": {"from": str(folder)}, "data": {"num_frames": 5, "workers": 0, **SIZES[generator]},
        "training": {"device": "cpu"}, **sections,
    })  # fmt: skip
    task = registry.generator(generator).load("task")(settings, torch.device("cpu"))
    shape = StepShape("video", 4)
    batches = [task.batch(VALIDATION_STEP, shape, range(i, i + 2), dropout=False).whole for i in (0, 2)]
    return SimpleNamespace(task=task, batches=batches, name=generator)


@pytest.fixture(scope="module")
def lumos(tmp_path_factory):
    return made("lumos1", lumos_folder(tmp_path_factory.mktemp("models") / "lumos"))


@pytest.fixture(scope="module")
def stiv(tmp_path_factory):
    return made("stiv", stiv_folder(tmp_path_factory.mktemp("models") / "stiv"), patterns={"none": 1, "first": 1})


@pytest.fixture(params=["lumos", "stiv"])
def case(request, lumos, stiv):
    return {"lumos": lumos, "stiv": stiv}[request.param]


def network(case):
    return decoder() if case.name == "lumos1" else transformer()


# ---- the split


@given(frames=st.integers(1, 6), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_content_and_motion_add_up(frames, width, seed):
    error = torch.randn(frames, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    content, motion = split(error)
    assert float(content + motion) == pytest.approx(float(error.square().sum()), rel=1e-12)
    assert float(split(error[:1].expand(frames, -1))[1]) == pytest.approx(0, abs=1e-24)
    assert float(split(error - error.mean(0))[0]) == pytest.approx(0, abs=1e-24)
    plain = sum(float((row - error.mean(0)).square().sum()) for row in error)
    assert float(motion) == pytest.approx(plain, rel=1e-12, abs=1e-24)


def test_direction_change_is_one_minus_the_cosine():
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    assert torch.allclose(direction_change(a, b), 1 - torch.nn.functional.cosine_similarity(a, b), atol=1e-6)
    assert direction_change(a, a).eq(0).all()
    assert torch.allclose(direction_change(a, -3 * a), torch.full((5,), 2.0))


# ---- what a task gives


def test_forward_gives_the_losses_of_training(case):
    model, micro = network(case), case.batches[0]
    with torch.no_grad():
        found, (losses, places) = case.task.forward(model, micro), case.task.losses(model, micro)
    assert torch.equal(found.losses, losses)
    level = places["mask_ratio" if case.name == "lumos1" else "time"]
    assert torch.equal(found.places["level"], level)
    assert int(found.places["level"].max()) < len(case.task.score_groups["level"])


def test_codes_are_sorted_into_first_copied_and_changed(lumos):
    """Return the expected content and motion, from the true codes of the clips, frame by frame."""
    micro = lumos.batches[0]
    with torch.no_grad():
        found = lumos.task.forward(decoder(), micro)
    first, wanted = lumos.task.config.visual_token_start, []
    for ids, targets, layout in zip(micro["input_ids"], micro["targets"], micro["layouts"], strict=True):
        truth = torch.where(targets != IGNORED, targets + first, ids)
        for k, frame in enumerate(layout.frames):
            for at in range(frame.content_start, frame.end - 1):
                if targets[at] != IGNORED:
                    before = truth[at - (frame.end - frame.start)] if k else None
                    wanted.append(0 if k == 0 else 1 if truth[at] == before else 2)
    assert found.places["frames"].tolist() == wanted


def test_compared_outputs_keep_the_products_of_logits(lumos):
    """The values have the same scalar products as the logits minus their mean."""
    model, other, micro = decoder(), decoder(), lumos.batches[0]
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(2)
        found = [list(lumos.task.forward(x, micro).outputs()) for x in (model, other)]
        logits = [x(micro["input_ids"]).logits[..., lumos.task.config.visual_token_start :][..., :64] for x in (model, other)]
    assert [len(x) for x in found] == [2, 2]
    (layout,), masked = {id(x): x for x in micro["layouts"][:1]}.values(), micro["targets"][0] != IGNORED
    frames = [torch.arange(frame.start, frame.end) for frame in layout.frames]
    places = [i for i in range(len(frames[0])) if all(masked[frame[i]] for frame in frames)]
    plain = torch.cat([torch.stack([x[0, frame[places]] for frame in frames]) for x in logits])
    plain = (plain - plain.mean(-1, keepdim=True)).flatten(1)
    values = torch.cat([x[0].values for x in found])
    torch.testing.assert_close(values @ values.T, plain @ plain.T, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(values[0], values[2])


def test_the_root_of_the_output_follows_the_weights_of_the_head():
    from lumos.models.lumos1.scoring import output_root

    head, h = decoder().lm_head, torch.randn(5, decoder().config.hidden_size)
    first = output_root(head)
    assert output_root(head) is first
    with torch.no_grad():
        head.weight.mul_(3)
    torch.testing.assert_close((h @ output_root(head).T).norm(dim=1), 3 * (h @ first.T).norm(dim=1))
    assert "_output_root" not in head.state_dict()


def test_stream_frames_of_the_decoder(lumos):
    micro = lumos.batches[0]
    frames = lumos.task.stream_frames(micro, torch.empty(*micro["input_ids"].shape, 8))
    for row, layout in zip(frames, micro["layouts"], strict=True):
        assert row[layout.length :].eq(-2).all()
        assert row[: layout.frames[0].start].eq(-1).all()
        for k, frame in enumerate(layout.frames):
            assert row[frame.start : frame.end].eq(k).all()


# ---- scores


def plain_shares(over, under, places, names) -> dict[str, float]:
    """Return {name of a place: sum of `over` / sum of `under`} of the values at each place that occurs."""
    found = {name: ([], []) for name in names}
    for a, b, place in zip(over, under, places, strict=True):
        for sums, value in zip(found[names[place]], (a, b), strict=True):
            sums.append(value)
    return {name: sum(a) / sum(b) for name, (a, b) in found.items() if b}


def plain_scores(case, model, names):
    """Return scores of units, and the same by group, from whole forward passes without a cache."""
    def run(skipped):
        losses, outputs, places = [], [], []
        with torch.no_grad(), model.skipping(skipped):
            for micro in case.batches:
                found = case.task.forward(model, micro)
                losses += found.losses.tolist()
                outputs += list(found.outputs())
                places.append(found.places)
        return losses, outputs, {group: torch.cat([part[group] for part in places]).tolist() for group in case.task.score_groups}

    def squares(rows) -> list[float]:
        return [float(row.double().square().sum()) for part in rows for row in part]

    losses, outputs, places = run([])
    frames = [min(int(frame), 1) for part in outputs for frame in part.frames]
    levels = [int(level) for part in outputs for level in part.levels]
    groups = {"frames": (frames, importance.FRAMES), "level": (levels, case.task.score_groups["level"])}
    power, ones, scores = squares([part.values for part in outputs]), [1] * len(losses), {}
    for name in names:
        changed, others, _ = run([name])
        rise = [a - b for a, b in zip(changed, losses, strict=True)]
        errors = [a.values - b.values for a, b in zip(others, outputs, strict=True)]
        content = sum(len(e) * float(e.mean(0).double().square().sum()) for e in errors)
        total = sum(squares(errors))
        scores[name] = {
            "loss": sum(rise) / len(rise), "output": total / sum(power), "content": content / sum(power),
            "motion": (total - content) / sum(power), "motion_share": 1 - content / total,
            "loss_by": {group: plain_shares(rise, ones, places[group], names) for group, names in case.task.score_groups.items()},
            "output_by": {group: plain_shares(squares(errors), power, *at) for group, at in groups.items()},
        }  # fmt: skip
    return scores


def test_scores_are_those_of_whole_forward_passes(case):
    model = network(case)
    for kind in model.unit_kinds:
        units = model.units(kind)
        found = score(case.task, model, case.batches, units, ["loss", "output"])["units"]
        for name, wanted in plain_scores(case, model, units).items():
            for measure in ("loss", "output", "content", "motion", "motion_share"):
                assert found[name][measure] == pytest.approx(wanted[measure], rel=1e-3, abs=1e-6), (name, measure)
            for measure in ("loss_by", "output_by"):
                assert found[name][measure].keys() == wanted[measure].keys()
                for group, values in wanted[measure].items():
                    assert found[name][measure][group] == pytest.approx(values, rel=1e-3, abs=1e-6), (name, measure, group)
    assert len(wanted["loss_by"]["level"]) > 1


def test_the_time_share_is_that_of_the_forward_pass(case, monkeypatch):
    """Each look at a clock adds a second: a layer takes one, and the pass all looks at the clock."""
    model, looks = network(case), []
    monkeypatch.setattr("time.perf_counter", lambda: float(looks.append(None) or len(looks)))
    found = score(case.task, model, case.batches, model.units(), ["loss"])["units"]
    layers = len(model.stages())
    assert [entry["time_share"] for entry in found.values()] == pytest.approx([1 / (2 * layers + 1)] * layers)


def test_layers_below_a_skipped_one_are_not_run_again(case):
    model, runs = network(case), []
    blocks = [block for (block,) in model.stages().values()]
    handles = [block.mlp.register_forward_hook(lambda *_, i=i: runs.append(i)) for i, block in enumerate(blocks)]
    score(case.task, model, case.batches[:1], model.units(), ["loss"])
    for handle in handles:
        handle.remove()
    assert [runs.count(i) for i in range(4)] == [1, 2, 3, 4]  # a full pass, and those without an earlier layer


def test_a_recorded_pass_leaves_no_trace(case):
    model, micro = network(case), case.batches[0]
    with torch.no_grad():
        before = case.task.forward(model, micro).losses
        trace = Trace(model)
        with trace.recording():
            case.task.forward(model, micro)
        with trace.replaying("2"), model.skipping(["2.mlp"]):
            case.task.forward(model, micro)
        assert case.task.forward(model, micro).losses.equal(before)
    stages = [module for modules in model.stages().values() for module in modules]
    assert not any("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks for module in stages)


def test_bi_by_kind_of_token(lumos):
    model, micro = decoder(), lumos.batches[0]
    found = score(lumos.task, model, [micro], model.units(), ["bi"])
    streams = []
    handles = [layer.register_forward_hook(lambda _, args, out: streams.append((args[0], out))) for layer in model.model.layers]
    with torch.no_grad():
        lumos.task.forward(model, micro)
    for handle in handles:
        handle.remove()
    frames = lumos.task.stream_frames(micro, streams[0][0])
    for i, (before, behind) in enumerate(streams):
        change = 1 - torch.nn.functional.cosine_similarity(before, behind, dim=-1)
        assert found["units"][str(i)]["bi"] == pytest.approx(float(change[frames > -2].mean()), rel=1e-4)
        for name, at in (("text", frames == -1), ("first frame", frames == 0), ("later frames", frames > 0)):
            assert found["units"][str(i)]["bi_by"][name] == pytest.approx(float(change[at].mean()), rel=1e-4)
    points = [before for before, _ in streams] + [streams[-1][1]]
    for i in range(5):
        for j in range(5):
            wanted = 1 - torch.nn.functional.cosine_similarity(points[i], points[j], dim=-1)[frames > -2].mean()
            assert found["distances"][i][j] == pytest.approx(float(wanted), abs=1e-5)


def test_magnitude_and_taylor_are_their_formulas(case):
    model = network(case)
    found = score(case.task, model, case.batches, model.units(), ["magnitude", "taylor"])["units"]
    sums = [case.task.losses(model, micro)[0] for micro in case.batches]
    (sum(s.sum() for s in sums) / sum(len(s) for s in sums)).backward()
    weights = dict(model.named_parameters())
    for name, owned in model.units().items():
        count = sum(weights[p].numel() for p in owned)
        square = sum(float(weights[p].detach().square().sum()) for p in owned) / count
        change = sum(float((weights[p].detach() * weights[p].grad).abs().sum()) for p in owned) / count
        assert found[name]["magnitude"] == pytest.approx(square, rel=1e-4)
        assert found[name]["taylor"] == pytest.approx(change, rel=1e-3)
    assert all(p.requires_grad for p in model.parameters())


def test_elbo_weighs_levels_equally(stiv):
    model = transformer()
    found = score(stiv.task, model, stiv.batches, model.units(), ["elbo"])["units"]
    by = found["1"]["loss_by"]["level"]
    assert len(by) >= 2
    assert found["1"]["elbo"] == pytest.approx(np.mean(list(by.values())))


def test_bi_is_no_measure_of_parts(case):
    model = network(case)
    with pytest.raises(UserError, match=r"the measure bi compares the stream around a whole layer, which 0\.mlp is not"):
        score(case.task, model, case.batches, model.units("mlp"), ["bi"])


# ---- the gain from history


def test_the_gain_from_history_is_that_of_two_losses(lumos):
    """The plain form masks the codes of earlier frames, clip by clip, and averages the losses of the last frame."""
    model, (start, mask) = decoder(), (lumos.task.config.visual_token_start, lumos.task.config.mask_token_id)

    def mean_loss(hide: bool) -> float:
        losses = []
        for micro in lumos.batches:
            for ids, targets, layout in zip(micro["input_ids"], micro["targets"], micro["layouts"], strict=True):
                ids, last = ids.clone(), layout.frames[-1]
                for at in range(layout.frames[0].start, last.start) if hide else ():
                    if ids[at] >= start:
                        ids[at] = mask
                logits = model(ids[None, : layout.length]).logits[0]
                for at in range(last.start, last.end):
                    if targets[at] != IGNORED:
                        losses.append(torch.nn.functional.cross_entropy(logits[at, start : start + 64], targets[at]))
        return float(torch.stack(losses).mean())

    passes: list[int] = []
    with torch.no_grad():
        whole = mean_loss(True) - mean_loss(False)
        found = history_gains(lumos.task, model, lumos.batches, ["1", "3"], lambda: passes.append(1))
        assert found[WHOLE] == pytest.approx(whole, rel=1e-4, abs=1e-5)
        with model.skipping(["3"]):
            assert found["3"] == pytest.approx(mean_loss(True) - mean_loss(False), rel=1e-4, abs=1e-5)
    assert len(passes) == 2 * 3 * len(lumos.batches)
    assert abs(found["1"] - found[WHOLE]) > 1e-6


def test_single_frames_gain_nothing_from_history(lumos):
    model = decoder()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    gains = history_gains(lumos.task, model, lumos.batches, list(model.units()))
    assert list(gains.values()) == pytest.approx([0] * 5, abs=1e-6)


# ---- planted truths


def idle_layer(model, number: int) -> None:
    """Make a layer an identity: its output projections give 0."""
    block = model.get_submodule(f"{model.stack}.{number}")
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()


def test_two_identity_layers_are_found_by_every_measure(case):
    model = network(case)
    for number in (1, 2):
        idle_layer(model, number)
    found = score(case.task, model, case.batches, model.units(), MEASURES)
    for name in ("1", "2"):
        scores = found["units"][name]
        assert scores["bi"] == scores["loss"] == scores["output"] == scores["elbo"] == 0
        assert scores["motion_share"] is None
        assert scores["taylor"] == 0
    for measure in MEASURES:
        scores = {name: entry[measure] for name, entry in found["units"].items()}
        assert removed_by("least", list(scores), 2, scores=scores, ends=measure not in ("loss", "elbo")) == ["1", "2"], measure
    assert removed_by("middle", ["0", "1", "2", "3"], 2, distances=found["distances"]) == ["1", "2"]


class Distance:
    """A probe whose losses are the distances of those of a task from those of the whole network, so that 0 is the least rise."""

    def __init__(self, case, model):
        self.task, self.score_groups, self.stream_frames = case.task, case.task.score_groups, case.task.stream_frames
        with torch.no_grad():
            self.whole = {id(micro): case.task.forward(model, micro).losses for micro in case.batches}

    def forward(self, model, micro):
        found = self.task.forward(model, micro)
        return replace(found, losses=(found.losses - self.whole[id(micro)]).abs())


def test_identity_layers_have_least_loss_and_lowest_gates(case):
    """No plan rule keeps the ends here, so that any of the four layers could be the lowest."""
    model = network(case)
    for number in (1, 2):
        idle_layer(model, number)
    probe = Distance(case, model)
    found = score(probe, model, case.batches, model.units(), ["loss", "elbo"])["units"]
    gates = learned_gates(probe, model, case.batches, list(model.units()), GateSettings(steps=60, lr=0.2))
    for scores in (*({name: entry[measure] for name, entry in found.items()} for measure in ("loss", "elbo")), gates):
        assert removed_by("least", list(scores), 2, scores=scores, ends=True) == ["1", "2"]


@pytest.mark.parametrize("units", [["0", "2"], ["0", "1", "2", "3"]])
def test_closed_gates_skip_units_and_open_ones_do_nothing(case, units):
    model, micro = network(case).requires_grad_(False), case.batches[0]
    whole = case.task.forward(model, micro).losses
    with gated(model, units, torch.ones(len(units))):
        torch.testing.assert_close(case.task.forward(model, micro).losses, whole)
    with model.skipping(units):
        skipped = case.task.forward(model, micro).losses
    with gated(model, units, torch.zeros(len(units))):
        assert torch.equal(case.task.forward(model, micro).losses, skipped)
    assert torch.equal(case.task.forward(model, micro).losses, whole)  # the hooks are gone


def test_gates_of_a_decoder():
    model = tokenizer()
    values = model.values(codes())
    with model.skipping(["mid", "up.1.0"]):
        skipped = model.decode_latent(values)
    with gated(model, ["mid", "up.1.0"], torch.zeros(2)):
        assert torch.equal(model.decode_latent(values), skipped)


class Stack(torch.nn.Module):
    """A stack of six residual units that add vectors of known sizes."""

    def __init__(self, sizes: list[float]):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(Added(size) for size in sizes)
        self.skipped: set[str] = set()

    def stages(self):
        return {str(i): (layer,) for i, layer in enumerate(self.layers)}

    @contextmanager
    def skipping(self, names):
        self.skipped = set(names)
        yield
        self.skipped = set()

    def forward(self, x):
        for name, layer in self.layers.named_children():
            x = x if name in self.skipped else layer(x)
        return x


class Added(torch.nn.Module):
    def __init__(self, size: float):
        super().__init__()
        self.size, self.map = size, torch.nn.Linear(8, 8)

    def forward(self, x):
        return x + self.size * torch.tanh(self.map(x))


def test_gates_find_idle_units_and_seeds_reproduce_them():
    model = Stack([1.0, 0.0, 1.0, 0.05, 1.0, 1.0])
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    target = model(x).detach()
    probe = SimpleNamespace(forward=lambda model, micro: SimpleNamespace(losses=(model(micro) - target).square().mean(1)))
    names = list(model.stages())
    found = learned_gates(probe, model, [x], names, GateSettings(steps=150))
    assert list(found) == names
    assert removed_by("learned", names, 4, scores=found) == ["1", "3"]
    assert max(found["1"], found["3"]) < 0.5 < min(found[name] for name in ("0", "2", "4", "5"))
    assert found == learned_gates(probe, model, [x], names, GateSettings(steps=150))
    assert found != learned_gates(probe, model, [x], names, GateSettings(steps=150, seed=1))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_gates_of_a_network_leave_its_weights_and_flags(case):
    model = network(case)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    found = learned_gates(case.task, model, case.batches, list(model.units()), GateSettings(steps=3))
    assert list(found) == list(model.units())
    assert all(0 < p < 1 for p in found.values())
    assert all(torch.equal(weight, before[name]) and weight.requires_grad for name, weight in model.named_parameters())
    with pytest.raises(UserError, match=r"the measure learned puts gates around whole layers, which 0\.mlp is not"):
        learned_gates(case.task, model, case.batches, list(model.units("mlp")), GateSettings(steps=1))


def test_a_temporal_unit_that_gives_nothing_has_no_motion_share(stiv):
    model = transformer()
    with torch.no_grad():
        model.blocks[2].temporal_gain.zero_()
    found = score(stiv.task, model, stiv.batches, model.units("temporal"), ["loss", "output", "taylor", "magnitude"])["units"]
    assert found["2.temporal"]["output"] == found["2.temporal"]["loss"] == 0
    assert found["2.temporal"]["motion_share"] is None
    assert all(0 < found[f"{i}.temporal"]["motion_share"] <= 1 for i in (0, 1, 3))


def test_pictures_have_no_motion():
    sums = importance.OutputSums(1)
    zero = torch.zeros(1, dtype=torch.int64)
    values = torch.ones(1, 6)
    sums.add(importance.Output(2 * values, zero, zero), importance.Output(values, zero, zero), importance.squares(values))
    found = sums.results(["all"])
    assert (found["output"], found["content"], found["motion"], found["motion_share"]) == (1.0, 1.0, None, None)


# ---- the decoder of pixels


def test_scores_of_a_tokenizer_decoder():
    model = tokenizer()
    probe = DecoderProbe(model)
    clips = np.random.default_rng(0).integers(0, 256, (3, 5, 16, 24, 3), dtype=np.uint8)
    batches = list(probe.batches(clips, 2))
    found = score(probe, model, batches, model.units(), ["loss", "output", "bi", "magnitude", "taylor"])["units"]
    assert list(found) == list(model.units())
    with torch.no_grad():
        plain = torch.cat([model.decode_latent(micro["values"]) for micro in batches])
        with model.skipping(["up.1.1"]):
            changed = torch.cat([model.decode_latent(micro["values"]) for micro in batches])
        video = torch.cat([micro["video"] for micro in batches])
    rise = (changed - video).square().mean() - (plain - video).square().mean()
    assert found["up.1.1"]["loss"] == pytest.approx(float(rise), rel=1e-3, abs=1e-6)
    assert found["up.1.1"]["output"] == pytest.approx(float((changed - plain).square().sum() / plain.square().sum()), rel=1e-4)
    assert all(0 < entry["bi"] < 2 for entry in found.values())
    idle = score(probe, model, batches, model.units("idle"), ["magnitude", "taylor"])["units"]["idle"]
    assert idle["taylor"] == 0
    assert not any(p.requires_grad for p in model.parameters())
