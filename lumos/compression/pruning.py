"""Physical removal: a plan and a folder become a folder whose network lacks the units of the plan.

Nothing else changes: the weights that stay are copied, blocks are numbered anew, and the config says what is missing. The
folder loads like the one it came from. `compression.json` beside the weights says where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumos.compression.networks import Network, in_one_place, kept_stages, written_counts
from lumos.compression.plans import Plan
from lumos.compression.prunable import Prunable
from lumos.compression.record import RECORD, read_record
from lumos.errors import RunError
from lumos.files import check_new, replacing_folder, write_json
from lumos.runtime import versions

SHARE_TO_WARN = 0.5
PEAK = 1e12
"""FLOP/s for seconds where no device's peak is given."""


@dataclass(frozen=True)
class Predicted:
    """The effect of a plan on a network, by arithmetic on its shapes.

    before, after  costs, see `Network.costs`, and the number of units of the plan's kind ("units")
    owned          parameters of the units that the plan removes
    kept           stages that stay
    warnings       sentences on what the plan may damage
    """

    before: dict[str, Any]
    after: dict[str, Any]
    owned: int
    kept: list[int] | list[str]
    warnings: tuple[str, ...]


def smaller(network: Prunable, plan: Plan) -> Prunable:
    """Return the network that a plan leaves. Raises UserError for units and sizes that do not fit."""
    return network.without(plan.remove).narrowed(plan.sizes)


def predict(network: Network, plan: Plan, peak: float = PEAK) -> Predicted:
    """Return what a plan will do. No weights are needed. Raises UserError for a plan that does not fit the network."""
    whole = network.on_meta()
    left = smaller(whole, plan)
    counts = [len(model.units(plan.units or None)) for model in (whole, left)]
    before, after = (
        {"units": count, **network.costs(model, peak)} for count, model in zip(counts, (whole, left), strict=True)
    )
    weights = {name: weight.numel() for name, weight in whole.named_parameters()}
    units = {name: owned for kind in whole.unit_kinds for name, owned in whole.units(kind).items()}
    owned = sum(weights[name] for name in {name for unit in plan.remove for name in units[unit]})
    share, kept = 1 - after["parameters"] / before["parameters"], kept_stages(whole, plan.remove)
    warnings = []
    if share > SHARE_TO_WARN:
        warnings.append(f"{share:.0%} of the parameters go: recovery may not be possible")
    ends = [name for name in (next(iter(whole.stages())), list(whole.stages())[-1]) if name in plan.remove]
    if ends and not network.ends:
        gone = f"{' and '.join(ends)}, the ends of the network, go" if ends[1:] else f"{ends[0]}, an end of the network, goes"
        warnings.append(f"{gone}: the ends matter most in most networks")
    return Predicted(before, after, owned, kept, tuple(warnings))


def prune(network: Network, plan: Plan, out: str | Path, scores: str | None = None, peak: float = PEAK) -> dict[str, Any]:
    """Write the folder `out` with the network that a plan leaves, and return the content of its compression.json.

    scores: the file that the plan's importance comes from, for the record. peak: FLOP/s of the device, for the seconds.

    Raises UserError for a plan that does not fit and for an `out` that exists, RunError if the written weights are not the
    predicted ones.
    """
    check_new(out)
    predicted = predict(network, plan, peak)
    left = smaller(network.load(), plan)
    if plan.new:
        left = network.renewed(left, plan.seed)
    record = {
        "parent": in_one_place(network.folder), "sha256": network.sha256, "part": network.part, "plan": plan.to_dict(),
        "kept": predicted.kept, "scores": scores, "before": predicted.before, "after": predicted.after, "losses": [], "steps": 0,
        **versions(),
    }  # fmt: skip
    if (network.place / RECORD).is_file():
        record["earlier"] = read_record(network.place)
    with replacing_folder(out) as writing:
        network.write(left, writing)
        made = network.written_at(writing)
        counted = {**made.costs(made.on_meta(), peak), **dict(zip(("parameters", "weight_bytes"), written_counts(made.place),
                                                                 strict=True))}  # fmt: skip
        wrong = {name: value for name, value in counted.items() if value != predicted.after[name]}
        if wrong:
            raise RunError(f"the written network has {wrong}, and {predicted.after} was predicted; nothing is written")
        write_json(made.place / RECORD, record)
    return record
