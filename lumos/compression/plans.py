"""Plans: which units a smaller network lacks, and the rules that choose them.

A plan is a JSON file that can be read and edited. It names the model that it was made for by the hash of its weights.

    spaced           the first unit, the last, and the others at even distances
    least            the units of the lowest importance by a named measure; scored again after each removal, or once
    magnitude        least, by the squares of the weights
    taylor           least, by the first-order change of the loss
    learned          the units whose gates, trained together, are open least often (after arXiv 2412.01199)
    bk               half of the units: of each pair the first, in the second half the last (the rule of BK-SDM)
    middle           the run of neighbours between whose ends the stream changes least (arXiv 2403.17887)
    shallow          the first units behind the first one (the rule of VDMini, arXiv 2411.18375)
    deep             the last units before the last one
    random           units drawn with a seed
    scratch          as spaced, with new weights: the baseline that was never trained

Rules keep the first and the last unit, unless ends are allowed. L units, of which K are kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lumos.compression.prunable import some
from lumos.errors import UserError, instead, shown
from lumos.files import read_json, write_json
from lumos.pipeline.inputs import MAX_SEED
from lumos.settings import is_whole

OF_SCORES = ("least", "magnitude", "taylor", "learned", "middle")
"""Rules that need scores."""
RULES = ("spaced", *OF_SCORES, "bk", "shallow", "deep", "random", "scratch")
MAX_PLAN_BYTES = 2**20


@dataclass(frozen=True)
class Plan:
    """The parts that are removed from a network.

    plan     the rule that chose the units, or "file"
    part     "model", or "decoder": that of the video tokenizer
    units    the kind of the units
    remove   names of the units that are removed
    sizes    sizes of the network that become smaller, {name: new size}
    new      whether the weights are new ones, drawn with `seed`
    seed     of rules and of weights that are drawn
    parent   the folder of the model
    sha256   the hash of its config and weights
    """

    plan: str
    part: str
    units: str
    remove: tuple[str, ...]
    sizes: dict[str, int] = field(default_factory=dict)
    new: bool = False
    seed: int = 0
    parent: str = ""
    sha256: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return asdict(self) | {"remove": list(self.remove)}

    def write(self, path: str | Path) -> None:
        write_json(path, self.to_dict())


def read_plan(path: str | Path, sha256: str, part: str) -> Plan:
    """Return the plan in a JSON file. Raises UserError for a file that is no plan or the plan of another model or part."""
    values = read_json(path, "a plan", MAX_PLAN_BYTES)
    known = {entry.name for entry in fields(Plan)}
    if not isinstance(values, dict) or not {"remove", "sha256"} <= values.keys() or not values.keys() <= known:
        raise UserError(f"{path} is no plan; it must be a JSON object with remove, sha256 and other fields of "
                        f"{', '.join(sorted(known))}")  # fmt: skip
    remove, sizes = values["remove"], values.get("sizes", {})
    if not isinstance(remove, list) or not all(isinstance(name, str) for name in remove) or len(set(remove)) < len(remove):
        raise UserError(f"{path}: remove is {shown(remove)}; it must be a list of different names of units, such as \"3\"")
    if not isinstance(sizes, dict):
        raise UserError(f"{path}: sizes is {shown(sizes)}; it must be an object such as {{}}")
    kinds = {"plan": str, "part": str, "units": str, "new": bool, "parent": str, "sha256": str}
    for name, kind in kinds.items():
        if not isinstance(values.get(name, kind()), kind):
            raise UserError(f"{path}: {name} is {shown(values[name])}; that is not allowed")
    if not (is_whole(seed := values.get("seed", 0)) and 0 <= seed <= MAX_SEED):
        raise UserError(f"{path}: seed is {shown(seed)}; it must be a whole number from 0 to {MAX_SEED}")
    plan = Plan(**{"plan": "file", "part": part, "units": ""} | values | {"remove": tuple(remove), "sizes": sizes})
    if plan.part != part:
        raise UserError(f"{path} is a plan for the part {shown(plan.part)}, not for {part}; give --part {plan.part}")
    if plan.sha256 != sha256:
        raise UserError(
            f"{path} is the plan of another model, {shown(plan.parent)} (sha256 {shown(plan.sha256[:12])}, not {sha256[:12]}); "
            "make a plan of this model, or write its sha256 into the file if the plan is meant for it"
        )
    return plan


# ---- rules: pure functions of numbers of units


def spaced(count: int, keep: int) -> list[int]:
    """Return the kept units: first, last and the others evenly, floor(i (L - 1) / (K - 1) + 1/2); the first alone for K = 1."""
    if keep == 1:
        return [0]
    return [(2 * i * (count - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep)]


def bk(count: int, keep: int) -> list[int]:
    """Return the kept units: the first of each pair up to the pair that starts at L/2, the last of each pair behind it.

    Raises UserError unless K is half of an even L.
    """
    if count % 2 or keep != count // 2:
        raise UserError(f"the plan bk keeps one unit of each pair, {count / 2:g} of {count}, not {keep}; give another plan")
    return [pair if pair <= count // 2 else pair + 1 for pair in range(0, count, 2)]


def shallow(count: int, keep: int) -> list[int]:
    """Return the kept units: the first, and the last K - 1."""
    return [0, *range(count - keep + 1, count)][:keep]


def deep(count: int, keep: int) -> list[int]:
    """Return the kept units: the first K - 1, and the last."""
    return [*range(keep - 1), count - 1][:keep]


def middle(distances: Sequence[Sequence[float]], keep: int, ends: bool = False) -> list[int]:
    """Return the kept units around the run of L - K neighbours between whose ends the stream changes least.

    distances: [L + 1][L + 1], 1 - cos between the streams before unit i and before unit j; L stands for the end.
    ends: whether the run may hold the first or the last unit.
    """
    count = len(distances) - 1
    length, inner = count - keep, 0 if ends else 1
    start = min(range(inner, keep + 1 - inner), key=lambda i: distances[i][i + length])
    return [i for i in range(count) if not start <= i < start + length]


def drawn(count: int, keep: int, seed: int, ends: bool = False) -> list[int]:
    """Return kept units, all choices equally likely."""
    fixed = set() if ends else {0, count - 1}
    inner = [i for i in range(count) if i not in fixed]
    return sorted(fixed | set(random.Random(seed).sample(inner, keep - len(fixed))))


def lowest(scores: Sequence[float], keep: int, ends: bool = False) -> list[int]:
    """Return the kept units after the L - K of the lowest scores are removed; of equal scores the first is removed."""
    inner = range(len(scores)) if ends else range(1, len(scores) - 1)
    removed = sorted(inner, key=lambda i: scores[i])[: len(scores) - keep]
    return [i for i in range(len(scores)) if i not in removed]


def greedy(
    units: Sequence[str], keep: int, score: Callable[[Sequence[str]], Mapping[str, float]], ends: bool = False
) -> list[str]:
    """Return the removed units: again and again the one of the lowest importance in the network without the earlier ones.

    score: a function of the units removed so far; it returns the importance of the others by name.
    """
    candidates = list(units) if ends else list(units)[1:-1]
    removed: list[str] = []
    while len(units) - len(removed) > keep:
        found = score(removed)
        removed.append(min((name for name in candidates if name not in removed), key=lambda name: found[name]))
    return removed


def check_keep(units: Sequence[str], keep: int, least: int, ends: bool) -> None:
    """Raise UserError unless `keep` of the units can be kept: from `least` up to one less than there are."""
    count = len(units)
    if count < 2 and least:
        raise UserError(f"there is only one unit, {some(units)}; nothing can be removed")
    if not least <= keep < count:
        raise UserError(f"--keep {keep} is not allowed; there are {count} units ({some(units)}): give {least} to {count - 1}")
    if not ends and keep < 2:
        raise UserError(f"--keep {keep} does not leave the first and the last unit; give at least 2, or --allow-ends")


def removed_by(
    rule: str, units: Sequence[str], keep: int, *, seed: int = 0, ends: bool = False,
    scores: Mapping[str, float] | None = None, distances: Sequence[Sequence[float]] | None = None,
) -> list[str]:  # fmt: skip
    """Return the names of the units that a rule removes.

    Args:
        units: names in the order of execution.
        keep: the number of units that stay.
        seed: of the rule random.
        ends: whether the first and the last unit may be removed.
        scores: importance by name, for the rules least, magnitude, taylor and learned.
        distances: see `middle`.

    Raises UserError for an unknown rule, and if the rule does not work for these numbers.
    """
    count = len(units)
    if rule in ("spaced", "scratch"):
        kept = spaced(count, keep)
    elif rule in ("bk", "shallow", "deep"):
        kept = {"bk": bk, "shallow": shallow, "deep": deep}[rule](count, keep)
    elif rule == "random":
        kept = drawn(count, keep, seed, ends)
    elif rule == "middle" and distances is not None:
        kept = middle(distances, keep, ends)
    elif rule in OF_SCORES and scores is not None:
        kept = lowest([scores[name] for name in units], keep, ends)
    else:
        raise UserError(f"plan {shown(rule)} is unknown{instead(rule, RULES)}, or a plan file that ends in .json")
    return [name for i, name in enumerate(units) if i not in kept]
