"""U-Nets: counts at full size, the map of tensors, and outputs equal to those of the teacher with units skipped."""

from __future__ import annotations

import functools
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_diffusers import MODELSCOPE, SVD, UNETS, aligned, loaded, make, output, saved, unet_skipping

from lumos.compression import unets
from lumos.compression.diffusers_folder import on_meta, write_pruned
from lumos.compression.diffusers_models import plan_folder
from lumos.compression.record import RECORD
from lumos.errors import UserError

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.slow
PLANS = ("vdmini", "vdmini-mid", "B", "B-mid")
CUSTOM = {
    "a pair": ["down_blocks.2.1", "up_blocks.1.1"],
    "the deepest stage": ["down_blocks.3", "up_blocks.0"],
    "only units that cannot be removed": ["down_blocks.0.1", "down_blocks.1.0", "up_blocks.2.0", "mid_block"],
    "a stage in the middle": ["down_blocks.1", "up_blocks.2"],
    "second slots of all": [f"{side}_blocks.{b}.1" for side in ("down", "up") for b in range(4)],
    "a stage, a pair, and slots without a partner": [
        "down_blocks.3", "up_blocks.0", "up_blocks.2.1", "down_blocks.0.1", "up_blocks.3.1", "up_blocks.3.2",
    ],
    "the slot that reads what entered the stage": ["down_blocks.1.1", "up_blocks.2.2"],
    "three slots against two": ["down_blocks.3", "up_blocks.0.1", "up_blocks.0.2", "up_blocks.0.0", "down_blocks.0.1"],
}


@functools.cache
def full_text(name: str) -> str:
    with torch.device("meta"):
        return getattr(diffusers, name)().to_json_string()


def full_config(name: str) -> dict:
    return json.loads(full_text(name))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A function from a name to the folder of a tiny teacher."""
    root = tmp_path_factory.mktemp("teachers")
    return {name: saved(root / name, name) for name in UNETS}


@pytest.fixture(scope="module")
def networks(teachers):
    """The tiny teachers by name, for tests that change nothing in them."""
    return {name: loaded(folder) for name, folder in teachers.items()}


@pytest.fixture
def pruned(teachers, tmp_path):
    """A function that prunes a tiny teacher and returns both folders and the content of compression.json."""

    def prune(name: str, remove: str | list[str]):
        teacher, student, plan = teachers[name], tmp_path / "student", remove
        if not isinstance(remove, str):
            plan = str(tmp_path / "plan.json")
            (tmp_path / "plan.json").write_text(json.dumps(remove))
        return teacher, student, write_pruned(teacher, plan_folder(teacher, plan), student)

    return prune


# ---- section 2 of the specification: full size, on the meta device


@pytest.mark.parametrize(("name", "plan", "before", "after", "stock"), [
    (SVD, "vdmini", 1_524_623_082, 939_884_186, False),
    (SVD, "vdmini-mid", 1_524_623_082, 1_125_456_029, True),
    (SVD, "B", 1_524_623_082, 1_133_279_389, False),
    (SVD, "B-mid", 1_524_623_082, 1_318_851_232, True),
    (MODELSCOPE, "vdmini", 1_411_233_860, 814_600_580, False),
    (MODELSCOPE, "B", 1_411_233_860, 1_032_590_980, False),
    (MODELSCOPE, "vdmini-mid", 1_411_233_860, 987_718_020, False),
    (MODELSCOPE, "B-mid", 1_411_233_860, 1_205_708_420, False),
])  # fmt: skip
def test_counts_of_the_published_sizes(name, plan, before, after, stock):
    found = unets.prune(full_config(name), plan)
    assert (found.before, found.after, found.stock, found.reduced) == (before, after, stock, ())
    student = on_meta(unets.model_class(found.config["_class_name"]), found.config)
    assert sum(p.numel() for p in student.parameters()) == after
    assert (found.config["_class_name"] == name) == stock
    assert ("mid_block" in found.config) != stock


def test_the_table_of_svd():
    rows = {unit: before for unit, before, _ in unets.prune(full_config(SVD), "vdmini").rows}
    pair = {"down_blocks.0.0": 3_281_281 + 7_267_201, "down_blocks.1.0": 9_839_361 + 26_412_801,
            "down_blocks.2.1": 42_616_321 + 100_339_201, "down_blocks.3.1": 42_616_321, "up_blocks.0.2": 60_642_561,
            "up_blocks.1.2": 52_449_281 + 100_339_201, "up_blocks.2.0": 20_082_561 + 26_412_801,
            "up_blocks.3.1": 4_408_641 + 7_267_201}  # fmt: skip
    samplers = {"down_blocks.0": 921_920, "down_blocks.2": 14_746_880, "up_blocks.2": 3_687_040}
    whole = {"down_blocks.0": 22_018_884, "down_blocks.1": 77_829_764, "down_blocks.2": 294_104_324, "down_blocks.3": 85_232_642,
             "mid_block": 185_571_843, "up_blocks.0": 196_674_563, "up_blocks.1": 489_498_886, "up_blocks.2": 132_929_926,
             "up_blocks.3": 36_052_166}  # fmt: skip
    assert {unit: rows[unit] for unit in pair} == pair
    assert {block: rows[f"{block}.sampler"] for block in samplers} == samplers
    assert {block: sum(n for unit, n in rows.items() if unit.startswith(block)) for block in whole} == whole


def test_the_map_of_vdmini():
    """D'.i.0 <- D.i.0, D'.2 <- D.2; U'.0 <- U.1; U'.1.{0,1} <- U.2.{0,2}; U'.2.{0,1} <- U.3.{0,2}."""
    found = unets.prune(full_config(SVD), "vdmini")
    assert found.kept == {"down_blocks": ((0,), (0,), (0, 1)), "up_blocks": ((0, 1, 2), (0, 2), (0, 2)), "mid_block": False}
    slots = {}
    for own, parent in found.tensors.items():
        if match := re.match(r"(?:down|up)_blocks\.\d+\.\w+\.\d+\.", own):
            slots[match[0]] = re.match(r"(?:down|up)_blocks\.\d+\.\w+\.\d+\.", parent)[0]
        else:
            assert own == parent
    both = ("resnets", "attentions")
    expected = {f"down_blocks.{i}.{kind}.0.": f"down_blocks.{i}.{kind}.0." for i in range(3) for kind in both}
    expected |= {f"down_blocks.2.{kind}.1.": f"down_blocks.2.{kind}.1." for kind in both}
    for block, sources in enumerate(([0, 1, 2], [0, 2], [0, 2])):
        expected |= {f"up_blocks.{block}.{kind}.{k}.": f"up_blocks.{block + 1}.{kind}.{slot}." for k, slot in enumerate(sources)
                     for kind in both}  # fmt: skip
    expected |= {f"down_blocks.{i}.downsamplers.0.": f"down_blocks.{i}.downsamplers.0." for i in range(2)}
    expected |= {f"up_blocks.{i}.upsamplers.0.": f"up_blocks.{i + 1}.upsamplers.0." for i in range(2)}
    assert slots == expected


# ---- written folders


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_named_plan(pruned, networks, name, plan):
    folder, out, record = pruned(name, plan)
    teacher, student = networks[name], loaded(out)
    assert type(student).__name__ == json.loads((out / "config.json").read_text())["_class_name"]
    drops, mid = plan.startswith("vdmini"), plan.endswith("-mid")
    slots = {f"{side}_blocks.{b}.1" for side, blocks in (("down", (0, 1) if drops else (0, 1, 3)),
             ("up", (2, 3) if drops else (0, 2, 3))) for b in blocks}  # fmt: skip
    twin = unet_skipping(teacher, slots | (set() if mid else {"mid_block"}), stages=3 if drops else 4)
    found = output(student, name)
    assert torch.equal(found, output(twin, name))
    assert not torch.equal(found, output(teacher, name))
    theirs = dict(teacher.named_parameters())
    mapped = plan_folder(folder, plan).tensors
    assert all(torch.equal(tensor, theirs[mapped[key]]) for key, tensor in student.named_parameters())
    counted = [sum(p.numel() for p in model.parameters()) for model in (teacher, student)]
    assert record["parameters"] == {"before": counted[0], "after": counted[1]}


@pytest.mark.parametrize("name", [SVD, pytest.param(MODELSCOPE, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("units", CUSTOM.values(), ids=CUSTOM)
def test_a_list_of_units(pruned, networks, name, units):
    _, out, record = pruned(name, units)
    kept = len(record["kept"]["down_blocks"])
    layout = unets.UNetLayout((32, 64, 96, 96), (2, 2, 2, 2))
    twin = unet_skipping(networks[name], layout.expanded(units, "test"), record["reduced"], kept)
    assert torch.equal(output(loaded(out), name), output(twin, name))


def test_lists_of_units_are_reduced_only_where_they_must():
    layout = unets.UNetLayout((32, 64, 96, 96), (2, 2, 2, 2))
    reduced = {name: unets.resolve(layout, layout.expanded(units, name)).reduced for name, units in CUSTOM.items()}
    assert reduced == {
        "a pair": set(),
        "the deepest stage": set(),
        "only units that cannot be removed": {"down_blocks.0.1", "down_blocks.1.0", "up_blocks.2.0"},
        "a stage in the middle": {"down_blocks.1.0", "up_blocks.2.0", "up_blocks.2.2"},
        "second slots of all": set(),
        "a stage, a pair, and slots without a partner": {"up_blocks.2.1", "up_blocks.3.2"},
        "the slot that reads what entered the stage": {"down_blocks.1.1", "up_blocks.2.2"},
        "three slots against two": {"down_blocks.0.1"},
    }


@pytest.mark.parametrize("name", UNETS)
def test_a_reduced_unit_is_one_whose_branches_give_zero(pruned, name):
    units = ["down_blocks.1.0", "down_blocks.2.1", "up_blocks.0.2", "up_blocks.3.0"]
    folder, out, record = pruned(name, units)
    assert record["reduced"] == sorted(units)
    teacher = loaded(folder)
    for unit in units:
        block, slot = unit.rsplit(".", 1)
        block, slot = teacher.get_submodule(block), int(slot)
        resnet, zero = block.resnets[slot], []
        if name == SVD:
            zero += [resnet.spatial_res_block.conv2, resnet.temporal_res_block.conv2]
        else:
            zero += [resnet.conv2, block.temp_convs[slot].conv4[-1]]
        if hasattr(block, "attentions"):
            zero += [block.attentions[slot].proj_out]
        if hasattr(block, "temp_attentions"):
            zero += [block.temp_attentions[slot].proj_out]
        for layer in zero:
            for parameter in layer.parameters():
                parameter.data.zero_()
    student = loaded(out)
    torch.testing.assert_close(output(student, name), output(teacher, name), rtol=1e-4, atol=1e-4)
    left = {key for key, _ in student.named_parameters()}
    for unit in record["reduced"]:
        block, slot = unit.rsplit(".", 1)
        of_slot = re.compile(rf"{block}\.(resnets|temp_convs|attentions|temp_attentions)\.{slot}\.")
        own = {key.rsplit(".", 1)[0] for key in left if of_slot.match(key)}
        assert own <= {f"{block}.resnets.{slot}.conv_shortcut"}


LAYOUTS = st.integers(1, 4).flatmap(
    lambda stages: st.tuples(
        st.lists(st.sampled_from([16, 32]), min_size=stages, max_size=stages), st.integers(1, 3), st.integers(0, 2**30)
    )
)


@settings(max_examples=15)
@given(LAYOUTS)
def test_any_list_of_units_gives_tensors_of_the_parents_shapes(case):
    """The pruned class builds each slot with the width of the parent's slot, and parameter counts agree."""
    widths, layers, seed = case
    stages = len(widths)
    config = {"_class_name": MODELSCOPE, "block_out_channels": widths, "layers_per_block": layers, "norm_num_groups": 8,
              "attention_head_dim": 4, "cross_attention_dim": 8, "down_block_types": ["DownBlock3D"] * stages,
              "up_block_types": ["UpBlock3D"] * stages}  # fmt: skip
    units = unets.UNetLayout(tuple(widths), (layers,) * stages).units()
    drawn = torch.rand(len(units), generator=torch.Generator().manual_seed(seed)) < 0.5
    remove = [unit for unit, draw in zip(units, drawn, strict=True) if draw] or [units[0]]
    found = unets.prune(config, "test", remove)
    parent = on_meta(diffusers.UNet3DConditionModel, config).state_dict()
    assert {name: tuple(parent[source].shape) for name, source in found.tensors.items()} == dict(found.shapes)
    assert len(set(found.tensors.values())) == len(found.tensors)
    left = {source.rsplit(".", 1)[0] for source in found.tensors.values()}
    for unit in set(remove) - set(found.reduced):
        block, _, slot = unit.rpartition(".")
        assert not any(name.startswith(f"{block}.resnets.{slot}." if block else "mid_block.") for name in left)


def test_a_pruned_unet_can_be_pruned_again(pruned, networks, tmp_path):
    _, out, _ = pruned(SVD, ["down_blocks.0.1", "mid_block"])
    (tmp_path / "again.json").write_text(json.dumps(["up_blocks.3.1", "down_blocks.2.1", "up_blocks.1.1"]))
    again = plan_folder(out, str(tmp_path / "again.json"))
    record = write_pruned(out, again, tmp_path / "again")
    assert record["reduced"] == ["up_blocks.3.1"]  # its partner is reduced already and stays
    teacher, student = networks[SVD], loaded(tmp_path / "again")
    units = {"down_blocks.2.1", "up_blocks.1.1", "mid_block"}
    twin = unet_skipping(teacher, units, {"down_blocks.0.1", "up_blocks.3.1"})
    assert torch.equal(output(student, SVD), output(twin, SVD))


# ---- loading


def test_stock_plans_load_in_stock_diffusers(pruned):
    _, out, _ = pruned(SVD, "vdmini-mid")
    student, found = diffusers.UNetSpatioTemporalConditionModel.from_pretrained(out, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert torch.equal(output(aligned(student), SVD), output(loaded(out), SVD))


def test_modelscope_with_equal_blocks_loads_in_diffusers(pruned):
    _, out, _ = pruned(MODELSCOPE, CUSTOM["second slots of all"])
    config = json.loads((out / "config.json").read_text())
    assert (config["_class_name"], config["layers_per_block"]) == (MODELSCOPE, 1)
    student = diffusers.UNet3DConditionModel.from_pretrained(out)
    assert torch.equal(output(aligned(student), MODELSCOPE), output(loaded(out), MODELSCOPE))


@pytest.mark.parametrize("name", UNETS)
def test_stock_diffusers_refuses_what_it_cannot_load(pruned, name):
    """diffusers' own class would add a middle block of random weights, so it is refused."""
    _, out, _ = pruned(name, ["mid_block"])
    assert json.loads((out / "config.json").read_text())["mid_block"] is None
    with pytest.raises(ValueError, match=r"Pruned.* does not exist"):
        getattr(diffusers, name).from_pretrained(out)


@pytest.mark.parametrize("name", UNETS)
def test_a_pruned_class_saves_and_loads_itself(pruned, tmp_path, name):
    _, out, _ = pruned(name, ["mid_block", "down_blocks.0.1", "down_blocks.2.1", "up_blocks.1.1"])
    model_class = getattr(unets, f"Pruned{name}")
    student = model_class.from_pretrained(out)
    assert isinstance(student, getattr(diffusers, name))
    student.save_pretrained(tmp_path / "again")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (out, tmp_path / "again"))
    assert {key: after[key] for key in before if not key.startswith("_")} == {
        key: value for key, value in before.items() if not key.startswith("_")
    }
    assert torch.equal(output(loaded(tmp_path / "again"), name), output(loaded(out), name))


def test_a_pruned_unet_trains_with_gradient_checkpointing(pruned):
    from tiny_diffusers import inputs

    _, out, _ = pruned(SVD, ["mid_block", "down_blocks.0.1", "up_blocks.2.0"])
    gradients = []
    for checkpointing in (False, True):
        student = loaded(out).train()
        if checkpointing:
            student.enable_gradient_checkpointing()
        student(**inputs(SVD)).sample.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in student.named_parameters()})
    assert all(grad is not None for grad in gradients[0].values())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad)


def test_the_record_names_its_parent_and_is_a_plan(pruned):
    import hashlib

    folder, out, _ = pruned(SVD, "vdmini")
    record = json.loads((out / RECORD).read_text())
    file = folder / "diffusion_pytorch_model.safetensors"
    assert record["parent"]["sha256"][file.name] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert record["plan"] == "vdmini"
    assert record["kept"] == {"down_blocks": [[0], [0], [0, 1]], "up_blocks": [[0, 1, 2], [0, 2], [0, 2]], "mid_block": False}
    again = plan_folder(folder, str(out / RECORD))
    named = plan_folder(folder, "vdmini")
    assert (again.tensors, again.config) == (named.tensors, named.config)


# ---- plans that do not fit


@pytest.mark.parametrize(("changed", "plan", "said"), [
    ({"block_out_channels": [32, 64, 64, 96]}, "vdmini", "deepest stage, which must have the width"),
    ({"layers_per_block": 1}, "B", "two slots in each down block"),
    ({"num_attention_heads": [2, 2, 4, 8]}, "vdmini-mid", "num_attention_heads"),
    ({"block_out_channels": [30]}, "vdmini", "no UNetSpatioTemporalConditionModel can be made"),
])  # fmt: skip
def test_a_named_plan_that_does_not_fit(changed, plan, said):
    config = json.loads(make(SVD).to_json_string()) | changed
    with pytest.raises(UserError, match=said):
        unets.prune(config, plan)


def test_a_list_of_unknown_units():
    config = json.loads(make(SVD).to_json_string())
    with pytest.raises(UserError, match=r"'down_blocks.4', which this model does not have; its units: down_blocks.0.0"):
        unets.prune(config, "plan.json", ["down_blocks.4"])


def test_the_module_imports_diffusers_late(forks):
    names = "import sys, lumos.compression.unets, lumos.compression.diffusers_models; print('diffusers' in sys.modules)"
    done = forks.run(["-c", names])
    assert done.stdout.strip() == "False", done.stderr
    assert unets.PrunedUNet3DConditionModel.__name__ == "PrunedUNet3DConditionModel"
    with pytest.raises(AttributeError):
        _ = unets.PrunedOther
