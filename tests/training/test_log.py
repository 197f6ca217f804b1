"""log.jsonl equals plain forms that compute its values from the clips, masks and losses of the steps."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_log import flat, read_log
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lumos.data.curriculum import Curriculum, StepShape
from lumos.data.seeding import VALIDATION_STEP, sample_generator
from lumos.device_peak import known_gpu, peak_flops
from lumos.models.lumos1.attention import allowed_pairs, attention_for
from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.flops import layer_flops_per_token, training_flops
from lumos.models.lumos1.masking import mask_ratio
from lumos.models.lumos1.modeling import LumosForVideoGeneration
from lumos.models.lumos1.sequence import Frame, SequenceLayout, frame_indices, parse_layout
from lumos.models.lumos1.training import RATIO_BINS, ArdfTask, ratio_bins
from lumos.runtime import versions
from lumos.training import loop
from lumos.training.logging import Meter, RunLog, read_lines, scalars
from lumos.training.loop import Run, train
from lumos.training.loss_sums import LossSums
from lumos.training.task import IGNORED

CPU = torch.device("cpu")
JOINT = {"stages": [{"image_share": 0.5, "image_batch_size": 6}]}

values = st.lists(st.tuples(st.integers(-8, 8), st.integers(0, 2), st.integers(0, 3)), max_size=30)


@given(values, st.integers(1, 5))
def test_sums_do_not_depend_on_how_positions_are_split(rows: list[tuple[int, int, int]], parts: int):
    """Compares with plain means of whole numbers, so that every sum is exact."""
    whole, split = LossSums({"frame": 3, "ratio": 4}), LossSums({"frame": 3, "ratio": 4})
    tensors = [torch.tensor([row[i] for row in rows], dtype=torch.int64) for i in range(3)]
    whole.add(tensors[0].float(), {"frame": tensors[1], "ratio": tensors[2]})
    for part in range(parts):
        loss, frame, ratio = (tensor[part::parts] for tensor in tensors)
        split.add(loss.float(), {"frame": frame, "ratio": ratio})
    assert torch.equal(whole.table, split.table)
    meter = Meter()
    meter.add_parts(whole.parts("video"))
    means = Meter(json.loads(json.dumps(meter.sums))).means()
    expected = {"loss_video": [row[0] for row in rows]}
    assert means.get("loss_video") == (np.mean(expected["loss_video"]) if rows else None)
    for name, column, size in (("frame_loss_video", 1, 3), ("ratio_loss_video", 2, 4)):
        lists = [[row[0] for row in rows if row[column] == place] for place in range(size)]
        assert means.get(name) == ([float(np.mean(v)) if v else None for v in lists] if rows else None)


def test_a_group_that_a_batch_does_not_have_gets_nothing():
    sums = LossSums({"frame": 2, "mask_ratio": 2})
    sums.add(torch.tensor([1.0, 3.0]), {"mask_ratio": torch.tensor([0, 1])})
    meter = Meter()
    meter.add_parts(sums.parts("image"))
    assert meter.means() == {"loss_image": 2.0, "mask_ratio_loss_image": [1.0, 3.0]}
    assert math.isnan(LossSums({}).mean)


def test_ratios_on_an_edge_belong_to_the_tenth_above():
    ratios = torch.tensor([k / 10 for k in range(11)])
    assert ratio_bins(ratios).tolist() == [*range(10), 9]
    assert ratio_bins(torch.tensor([0.699, 0.7999, 0.8001])).tolist() == [6, 7, 8]


def losses_of_positions(task: ArdfTask, model: torch.nn.Module, step: int, shape: StepShape, *, seed: int, dropout: bool) -> list:
    """Return (loss, latent frame, tenth of the mask ratio) of each supervised position of a step, clip by clip."""
    found = []
    for position in range(shape.batch_size):
        batch = task.batch(step, shape, range(position, position + 1), dropout=dropout)
        targets = batch.tensors["targets"]
        with torch.no_grad():
            logits = model(batch.tensors["input_ids"]).logits[..., task.config.visual_token_start :]
        logits = logits[..., : task.config.visual_token_count]
        loss = torch.nn.functional.cross_entropy(logits[0], targets[0], ignore_index=IGNORED, reduction="none")
        frames = frame_indices(parse_layout(batch.tensors["input_ids"], task.config), targets.shape[1])[0]
        drawn = float(torch.rand((), generator=sample_generator(seed, step, position, "mask")))
        tenth = min(math.floor(mask_ratio(drawn) * 10), 9)
        found += [(float(loss[i]), int(frames[i]), tenth) for i in (targets[0] != IGNORED).nonzero()[:, 0]]
    return found


def means_by(positions: list, column: int, size: int) -> list[float]:
    lists = defaultdict(list)
    for position in positions:
        lists[position[column]].append(position[0])
    return [float(np.mean(lists[place])) if place in lists else None for place in range(size)]


@pytest.mark.slow
def test_every_loss_of_a_line_is_a_mean_over_positions(micro_settings, tmp_path):
    """Compares lines of three steps with constant weights, micro-batches of one clip, and pictures and clips of several sizes."""
    settings = micro_settings(data=JOINT, training={"lr": 0.0, "log_every": 3, "micro_batch_size": 1})
    task = ArdfTask(settings, CPU)
    model, shape_of = task.build_model(), Curriculum(settings.data.stages, 4)
    train(settings)
    for line, steps in ((3, range(3)), (6, range(3, 6))):
        all_of_them = {"image": [], "video": []}
        for step in steps:
            shape = shape_of(step)
            all_of_them[shape.kind] += losses_of_positions(task, model, step, shape, seed=0, dropout=True)
        expected = {"loss": float(np.mean([p[0] for found in all_of_them.values() for p in found]))}
        for kind, found in all_of_them.items():
            expected[f"loss_{kind}"] = float(np.mean([p[0] for p in found]))
            expected[f"mask_ratio_loss_{kind}"] = means_by(found, 2, RATIO_BINS)
        expected["frame_loss_video"] = means_by(all_of_them["video"], 1, 2)
        for name, value in expected.items():
            logged = read_log(tmp_path / "run", name)
            assert flat({line: logged[line]}) == pytest.approx(flat({line: value}), abs=1e-5, nan_ok=True), name
        means_of_means = np.mean([expected["loss_image"], expected["loss_video"]])
        assert abs(expected["loss"] - means_of_means) > 1e-4


@pytest.mark.slow
def test_validation_does_not_depend_on_the_training_seed(micro_settings, tmp_path):
    settings = micro_settings(
        data={**JOINT, "validation_clips": 3}, training={"max_steps": 2, "eval_every": 2, "lr": 0.0, "micro_batch_size": 2}
    )
    task = ArdfTask(settings, CPU)
    model = task.build_model()
    train(settings)
    for kind in ("image", "video"):
        shape = StepShape(kind, 3)
        found = losses_of_positions(task, model, VALIDATION_STEP, shape, seed=0, dropout=False)
        expected = {
            f"val_loss_{kind}": float(np.mean([p[0] for p in found])),
            f"val_mask_ratio_loss_{kind}": means_by(found, 2, RATIO_BINS),
        }
        if kind == "video":
            expected["val_frame_loss_video"] = means_by(found, 1, 2)
        for name, value in expected.items():
            assert flat(read_log(tmp_path / "run", name)) == pytest.approx(flat({2: value}), abs=1e-5, nan_ok=True), name
        other = ArdfTask(micro_settings(data={**JOINT, "scenes": 4}, training={"seed": 7}), CPU)
        ours, theirs = (t.batch(VALIDATION_STEP, shape, range(3), dropout=False).tensors for t in (task, other))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        ours, theirs = (t.batch(0, shape, range(3), dropout=False).tensors for t in (task, other))
        assert not torch.equal(ours["targets"], theirs["targets"])


@pytest.mark.slow
def test_seconds_leave_out_validation_and_saving(micro_settings, tmp_path, monkeypatch):
    """Set a clock that moves by 5 s for a batch, 2 s for a step, 100 s for a validation and 1000 s for a save."""
    clock = SimpleNamespace(now=0.0)

    def lasting(cls: type, name: str, seconds: float) -> None:
        original = getattr(cls, name)

        def slow(self, *args, **kwargs):
            clock.now += seconds
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, slow)

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now))
    for name, seconds in (("_prepare", 5), ("_train_step", 2), ("validate", 100), ("save", 1000)):
        lasting(Run, name, seconds)
    train(micro_settings(training={"log_every": 2, "eval_every": 1, "save_every_steps": 1}, logging={"peak_tflops": 3e-6}))
    assert set(read_log(tmp_path / "run", "data_wait").values()) == {5.0}
    assert set(read_log(tmp_path / "run", "seconds").values()) == {7.0}
    task = ArdfTask(micro_settings(), CPU)
    batches = [task.batch(step, StepShape("video", 4), range(4)) for step in range(6)]
    for line, rate in read_log(tmp_path / "run", "tokens_per_second").items():
        assert rate == pytest.approx(sum(batch.tokens for batch in batches[line - 2 : line]) / 14)
    for line, share in read_log(tmp_path / "run", "mfu").items():
        assert share == pytest.approx(sum(batch.flops for batch in batches[line - 2 : line]) / 14 / 3e6)


def test_wait_and_memory_are_the_maximum_over_processes(micro_settings, tmp_path, monkeypatch):
    """Simulate a second process by its share of the sums."""
    settings = micro_settings(training={"max_steps": 1})
    run = Run(settings, ArdfTask(settings, CPU), CPU)
    original = run.engine.all_sum
    run.engine.world = 2
    monkeypatch.setattr(run, "_prepare", lambda step: run.task.prepare(step, run.curriculum(step), range(4)))
    other = torch.tensor([[0.0, 1e6], [0.0, 2.0**50]], dtype=torch.float64)
    run.engine.all_sum = lambda values: original(values + other if values.shape == other.shape else values)
    monkeypatch.setattr(run, "validate", dict)
    monkeypatch.setattr(run, "save", lambda **_: None)
    monkeypatch.setattr(run, "export", dict)
    run.train()
    run.log.close()
    assert read_log(tmp_path / "run", "data_wait") == {1: 1e6}
    assert read_log(tmp_path / "run", "memory_bytes") == {1: 2**50}


@given(st.lists(st.booleans(), min_size=1, max_size=4), st.integers(1, 12), st.integers(0, 3))
def test_keys_in_sight_are_those_of_the_rule(frames: list[bool], prefix: int, tail: int):
    """Compares with the rule for each pair of tokens: key <= query, or both in one frame."""
    places, at = [], prefix
    for gap in frames:
        at += gap
        places.append(Frame(at, 2, 2))
        at = places[-1].end
    layout = SequenceLayout(at + tail, tuple(places))
    frame = frame_indices([layout], layout.length)[0].tolist()
    seen = sum(k <= q or (frame[q] >= 0 and frame[q] == frame[k]) for q in range(layout.length) for k in range(layout.length))
    assert allowed_pairs(layout) == seen


def test_flops_are_those_that_torch_counts():
    """The clip has no text, because torch also counts the hidden half of causal attention."""
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LumosConfig.preset("tiny", **sizes, num_attention_heads=4, num_key_value_heads=2)
    model = LumosForVideoGeneration(config)
    layout = SequenceLayout(3 * 24, tuple(Frame(start, 4, 4) for start in (0, 24, 48)))
    shape = (1, layout.length)
    rotary = model.rotary(torch.zeros(1, 3, layout.length, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = model.model(torch.ones(shape, dtype=torch.int64), rotary, attention_for("segmented", [layout], layout.length, CPU))
        model.lm_head(hidden[0, :30], targets=torch.zeros(30, dtype=torch.int64)).sum().backward()
    uncounted = 2 * 30 * config.hidden_size * config.visual_token_count  # of the head's gradient, added in place
    assert counter.get_total_flops() + uncounted == training_flops(config, layout, 30)
    assert layer_flops_per_token(config, 0) == 2 * matrix_weights(model)


def matrix_weights(model: LumosForVideoGeneration) -> int:
    return sum(module.weight.numel() for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear))


def test_flops_and_tokens_of_shares_add_up(micro_settings):
    task = ArdfTask(micro_settings(), CPU)
    shape = StepShape("video", 4)
    whole = task.batch(3, shape, range(4))
    shares = [task.batch(3, shape, positions) for positions in (range(1), range(1, 4))]
    assert whole.flops == pytest.approx(sum(share.flops for share in shares), rel=1e-12)
    assert whole.flops > 6 * whole.tokens * matrix_weights(task.build_model())


def test_the_peak_is_stated_measured_or_from_a_data_sheet(micro_settings, tmp_path, monkeypatch):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    measured, known = peak_flops(CPU, torch.float32, None)
    assert torch.equal(torch.get_rng_state(), before)
    assert (measured > 1e8, known) == (True, "measured")
    assert peak_flops(CPU, torch.float32, 2.5) == (2.5e12, "stated")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), torch.bfloat16, None) == (989.4e12, "data sheet of H100")
    train(micro_settings(training={"max_steps": 1}))
    start = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert (start["peak_flops"], start["peak_flops_from"]) == (0.1e12, "stated")


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GH200 480GB", "GH200"), ("NVIDIA H200", "H200"), ("NVIDIA H200 NVL", "H200 NVL"), ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"), ("NVIDIA A10", "A10"), ("NVIDIA A10G", None), ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("", None),
    ],
)  # fmt: skip
def test_gpus_are_known_by_name(name: str, entry: str | None):
    assert known_gpu(name) == entry


@pytest.mark.slow
def test_every_field_is_documented(micro_settings, tmp_path, repo):
    options = {"max_steps": 2, "eval_every": 2, "ema_decay": 0.9}
    samples = {"every": 2, "prompts": ["a circle"], "options": {"num_inference_steps": 1}}
    train(micro_settings(data=JOINT, training=options, samples=samples))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line.get("event") for line in lines] == ["start", None, None, None, "samples", "end"]
    text = (repo / "docs" / "train" / "logging.md").read_text()
    for field in {field for line in lines for field in line} - versions().keys():
        name = re.sub("_(image|video)$", "_<kind>", field.removeprefix("val_").removesuffix("_ema"))
        assert f"`{name}`" in text, field


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_terminal_shows_step_loss_and_rate(micro_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    train(micro_settings(training={"max_steps": 2}))
    line = sys.stderr.getvalue().splitlines()[-1]
    loss, lr = (read_log(tmp_path / "run", key)[2] for key in ("loss", "lr"))
    assert re.search(rf"2/2 .*step.*loss={loss:.4f}, lr={re.escape(f'{lr:.2e}')}", line), line


def test_names_for_dashboards():
    line = {"step": 4, "time": 1.0, "loss": 2.0, "val_loss_video": 3.0, "frame_loss_video": [None, 5.0], "mfu": None}
    assert dict(scalars(line)) == {"train/loss": 2.0, "val/loss_video": 3.0, "train/frame_loss_video/1": 5.0}


def test_lines_that_cannot_be_read_do_not_stop_a_resume(tmp_path):
    """A power cut, a full disk or an editor may leave such lines."""
    file = tmp_path / "log.jsonl"
    good = [{"event": "start", "step": 0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"note": 1}, {"step": "x"}]
    bad = [b"\xff\xfe\x00", b"\x00" * 4096, b"5", b"[1]", b"null", b'"text"', b"", b"[" * 10_000, b'{"step": 1', b"9" * 5000]
    bad.append(b'{"a": "\xe9"}')
    lines = [json.dumps(line).encode() for line in good]
    file.write_bytes(b"\n".join([*lines, *bad, b'{"step": 3, "loss": 1.0}', b'{"step": NaN}', b'{"step": 2, "lo']))
    assert list(read_lines(file))[: len(good)] == good
    RunLog(tmp_path, first_step=2, max_steps=0, enabled=True).write(step=3, loss=0.5)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [*good, {"step": 3, "loss": 0.5}]
