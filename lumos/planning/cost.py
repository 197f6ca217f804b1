"""The interface between planning and a generator: the cost of its training and of its clips, by arithmetic.

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
    """The cost of training a network, with or without adapters.

    A `sequence` is the generator's own description of the input of the network for one clip.

    parameters         number of all parameters, adapters included
    trained            number of parameters with gradients
    is_tuned           whether only adapters are trained
    matrices           number of trained weights in the matrices of the layers, which Muon updates
    stacked            largest number of these weights in matrices of one shape
    trained_shapes     shapes of the parameters with gradients, from which the state of Adafactor follows
    largest_parameter  elements of the largest parameter; its whole gradient exists under every ZeRO stage
    size_unit          height and width of clips are multiples of this number of pixels
    assumed            sentences on assumptions that the settings do not state
    """

    parameters: int
    trained: int
    is_tuned: bool
    matrices: int
    stacked: int
    trained_shapes: Sequence[tuple[int, ...]]
    largest_parameter: int
    size_unit: int
    assumed: Sequence[str]

    def cast_parameters(self, checkpointing: bool) -> int:
        """Return the number of parameters of which autocast keeps a bf16 copy during a step."""

    def sequence(self, num_frames: int, height: int, width: int) -> Any:
        """Return the sequence of a clip of this shape."""

    def tokens(self, sequence: Any) -> int:
        """Return the number of all tokens of a sequence."""

    def codes(self, sequence: Any) -> int:
        """Return the number of tokens of a sequence that are visual codes."""

    def supervised(self, sequence: Any) -> float:
        """Return the mean number of positions of a sequence that have a loss."""

    def training_flops(self, sequence: Any, supervised: float) -> float:
        """Return the FLOPs of the forward and backward pass of a sequence."""

    def recomputed_flops(self, sequence: Any) -> float:
        """Return the FLOPs that activation checkpointing adds for a sequence."""

    def memory_moments(self, sharding: Sharding, rows: int, sequence: Any) -> dict[str, dict[str, int]]:
        """Return the memory of one process in bytes, by moment of a step and by part.

        The moments are named by the generator and include "start", the start of the run. The parts are
        `lumos.planning.sharding.PARTS`. `rows` is the number of sequences in a micro-batch.
        """


class ClipCost(Protocol):
    """The cost of one clip."""

    def warn_of_effects(self, given: Mapping[str, Any]) -> None:
        """Warn of the sampling options in `given` that have no effect on this clip."""

    def report(self, peak: float, utilisation: float) -> dict[str, Any]:
        """Return the FLOPs by part, bytes and seconds as JSON values.

        `peak` is the FLOP/s of the device and `utilisation` the share of it that is reached. In the result,
        `may_end_early` says whether the number of steps is an upper bound.
        """
