"""Video transformers: plans, and students equal to their teachers with blocks skipped, in the stock class."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_diffusers import COUNTS, TRANSFORMERS, blocks_skipped, loaded, make, output, saved

from lumos.compression import plans, transformers
from lumos.compression.diffusers_folder import write_pruned
from lumos.compression.diffusers_models import plan_folder
from lumos.errors import UserError

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.slow
RULES = {name: getattr(plans, name) for name in transformers.PLANS}
FIRST = {name: next(iter(counts)) for name, counts in COUNTS.items()}


@given(st.integers(2, 60).flatmap(lambda count: st.tuples(st.just(count), st.integers(2, count))))
def test_every_plan_keeps_both_ends_and_as_many_blocks_as_asked(case):
    count, keep = case
    for rule in RULES.values():
        kept = rule(count, keep)
        assert len(kept) == keep
        assert kept == sorted(set(kept))
        assert (kept[0], kept[-1]) == (0, count - 1)
    assert plans.spaced(count, keep) == [int(i * (count - 1) / (keep - 1) + 0.5 + 1e-9) for i in range(keep)]
    assert plans.shallow(count, keep)[1:] == list(range(count - keep + 1, count))
    assert plans.deep(count, keep)[:-1] == list(range(keep - 1))
    for rule in RULES.values():
        assert rule(count, count) == list(range(count))


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("plan", ["spaced", "shallow", "deep", "list"])
def test_the_student_is_the_teacher_with_blocks_skipped(tmp_path, name, plan):
    folder, out = saved(tmp_path / "teacher", name), tmp_path / "student"
    keep = [max(2, count // 2) for count in COUNTS[name].values()]
    if plan == "list":
        removed = [f"{blocks}.{i}" for blocks in COUNTS[name] for i in (0, 2)]
        (tmp_path / "plan.json").write_text(json.dumps({"remove": removed}))
        pruning = plan_folder(folder, str(tmp_path / "plan.json"))
    else:
        rule = RULES[plan]
        removed = [f"{blocks}.{i}" for (blocks, count), n in zip(COUNTS[name].items(), keep, strict=True)
                   for i in range(count) if i not in rule(count, n)]  # fmt: skip
        pruning = plan_folder(folder, plan, keep)
    record = write_pruned(folder, pruning, out)
    teacher = loaded(folder)
    student, found = getattr(diffusers, name).from_pretrained(out, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    with blocks_skipped(teacher, removed):
        expected = output(teacher, name)
    assert torch.equal(output(copy.deepcopy(student), name), expected)
    assert not torch.equal(output(teacher, name), expected)
    theirs = teacher.state_dict()
    assert all(torch.equal(tensor, theirs[pruning.tensors[key]]) for key, tensor in student.state_dict().items())
    counted = [sum(p.numel() for p in model.parameters()) for model in (teacher, student)]
    assert record["parameters"] == {"before": counted[0], "after": counted[1]}
    config = json.loads((out / "config.json").read_text())
    for blocks, count in COUNTS[name].items():
        left = [i for i in range(count) if f"{blocks}.{i}" not in removed]
        assert record["kept"][blocks] == left
        assert config[transformers.BLOCKS[name][blocks]] == len(left)


def test_one_list_of_hunyuan_may_stay_whole(tmp_path):
    name = "HunyuanVideoTransformer3DModel"
    folder = saved(tmp_path / "teacher", name)
    found = plan_folder(folder, "spaced", [4, 2])
    assert found.remove == ("single_transformer_blocks.1", "single_transformer_blocks.2", "single_transformer_blocks.3")
    assert found.kept["transformer_blocks"] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_full_sizes_are_counted_on_the_meta_device(name):
    with torch.device("meta"):
        model = getattr(diffusers, name)()
    config = json.loads(model.to_json_string())
    counts = [config[entry] for entry in transformers.BLOCKS[name].values()]
    found = transformers.prune(config, "spaced", keep=[count // 2 for count in counts])
    sizes = [sum(p.numel() for p in getattr(model, blocks)[0].parameters()) for blocks in transformers.BLOCKS[name]]
    assert found.before == sum(p.numel() for p in model.parameters())
    assert found.before - found.after == sum((count - count // 2) * size for count, size in zip(counts, sizes, strict=True))


@pytest.mark.parametrize(("name", "keep", "said"), [
    ("WanTransformer3DModel", [], "needs --keep .* 0 given, and this model has 6 blocks"),
    ("WanTransformer3DModel", [3, 3], "needs --keep .* 2 given"),
    ("WanTransformer3DModel", [1], "--keep 1 is not allowed"),
    ("WanTransformer3DModel", [0], "--keep 0 is not allowed"),
    ("WanTransformer3DModel", [7], "--keep 7 is not allowed; this model has 6 blocks"),
    ("WanTransformer3DModel", [6], "keeps every block"),
    ("HunyuanVideoTransformer3DModel", [3], "1 given, and this model has 4 transformer_blocks and 5 single_transformer_blocks"),
])  # fmt: skip
def test_numbers_that_do_not_fit(tmp_path, name, keep, said):
    config = json.loads(make(name).to_json_string())
    with pytest.raises(UserError, match=said):
        transformers.prune(config, "spaced", keep=keep)


def test_lists_that_do_not_fit():
    config = json.loads(make("WanTransformer3DModel").to_json_string())
    with pytest.raises(UserError, match=r"'blocks.6', which this model does not have; its units: blocks.0, blocks.1"):
        transformers.prune(config, "plan.json", ["blocks.6"])
    with pytest.raises(UserError, match="leaves no blocks"):
        transformers.prune(config, "plan.json", [f"blocks.{i}" for i in range(6)])
