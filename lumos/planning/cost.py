"""What planning asks of a generator: the cost of its training and of its clips, by arithmetic.

`Generator.cost` names two modules:

    "training"   training_cost(settings, text_tokens) -> TrainingCost
    "clip"       model_of(folder, preset) -> (config, sampling options, clip defaults)
                 clip_cost(config, clip, sampling, text_tokens, dtype) -> ClipCost
                 out_of_memory_advice(config, clip, sampling, text_tokens, dtype, clips) -> str
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lumos.planning.sharding import Sharding


class TrainingCost(Protocol):
    """The cost of training a network, with or without adapters. A `sequence` is what the network reads of one clip.

    parameters         all parameters, those of adapters included; trained: those that have gradients
    is_tuned           only adapters are trained
    matrices           trained weights of the layers' matrices, which Muon updates; stacked: the most of them of one shape
    largest_parameter  elements of the largest parameter, whose gradient is made whole under every ZeRO stage
    size_unit          height and width of clips are multiples of so many pixels
    assumed            sentences on what the settings do not say
    """

    parameters: int
    trained: int
    is_tuned: bool
    matrices: int
    stacked: int
    largest_parameter: int
    size_unit: int
    assumed: Sequence[str]

    def cast_parameters(self, checkpointing: bool) -> int:
        """Parameters of which autocast keeps a bf16 copy during a step."""

    def sequence(self, num_frames: int, height: int, width: int) -> Any:
        """The sequence of a clip of this shape."""

    def tokens(self, sequence: Any) -> int:
        """All tokens of a sequence."""

    def codes(self, sequence: Any) -> int:
        """The tokens of a sequence that stand for pixels."""

    def supervised(self, sequence: Any) -> float:
        """The mean number of losses of a sequence."""

    def training_flops(self, sequence: Any, supervised: float) -> float:
        """FLOPs of forward and backward of a sequence."""

    def recomputed_flops(self, sequence: Any) -> float:
        """FLOPs that activation checkpointing adds to a sequence."""

    def memory_moments(self, sharding: Sharding, rows: int, sequence: Any) -> dict[str, dict[str, int]]:
        """Moment of a step -> part (`lumos.planning.sharding.PARTS`) -> bytes of one process, for `rows` sequences at a time."""


class ClipCost(Protocol):
    """The cost of one clip."""

    def warn_of_effects(self, given: Mapping[str, Any]) -> None:
        """Warn of sampling options that were given, but have no effect on this clip."""

    def report(self, peak: float, utilisation: float) -> dict[str, Any]:
        """FLOPs by part, bytes and seconds as JSON values.

        peak: FLOP/s of the device, of which the share `utilisation` is reached. `may_end_early` says that steps are an upper bound.
        """
