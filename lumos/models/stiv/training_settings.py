"""Settings of a training run of STIV: the shared settings, and those of flow matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lumos.errors import UserError, shown
from lumos.models.stiv.configuration import LATENTS, PATTERNS, TEXT_ENCODERS
from lumos.models.stiv.settings import MAX_STRIDE, StivOptions
from lumos.settings import is_number, setting
from lumos.training.sections import LoraSettings
from lumos.training.settings import TrainingSettings, check_named_shares

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
TIMES = ("uniform", "logit_normal")
WEIGHTINGS = ("none", "min_snr")
SAVED_OUTPUTS = ("attention", "products")


@dataclass
class FlowSettings:
    times: str = setting("uniform", "distribution of the time of a clip, from 0 (noise) to 1 (data) (not published)", choices=TIMES)
    mean: float = setting(0.0, "mean of logit_normal times; above 0 gives more of them near the data", low=-100, high=100)
    std: float = setting(1.0, "standard deviation of logit_normal times", above=0, high=100)
    shift: float = setting(1.0, "above 1 gives more times near the noise, as large pictures need; 1: none", above=0, high=1000)
    weighting: str = setting(
        "none",
        "weights of the losses by time: none (published), or min_snr: that of the squared error of the data times the lower of "
        "signal / noise and gamma, with mean 1 over uniform times (after arXiv 2303.09556)",
        choices=WEIGHTINGS,
    )
    gamma: float = setting(5.0, "gamma of min_snr", above=0, high=1e6)


@dataclass
class StivDropoutSettings:
    text: float = setting(0.10, "share of clips that have the empty text, for guidance (published 0.10)", low=0, high=1)
    image: float = setting(0.08, "share of clips whose given frames are not given (published 0.08)", low=0, high=1)
    joint: float = setting(0.0, "share of clips that lose both, beside the two shares above (published: none)", low=0, high=1)


@dataclass
class InitSettings:
    image: str | None = setting(None, "model folder for all weights but those of temporal attention, of pictures or of clips")
    temporal: str | None = setting(
        None, "model folder for temporal attention; null: that of init.image, or new weights if it has none"
    )


@dataclass
class StivLatentSettings:
    kind: str | None = setting(None, "kind of latents; null: that of the preset or the model", choices=(None, *LATENTS))
    mean: list[float] = setting([], "mean of each channel; empty: that of the model to start from, or measured")
    std: list[float] = setting([], "standard deviation of each channel; empty: as mean")
    statistics_clips: int = setting(
        64, "clips of the first steps from which mean and standard deviation are measured", low=1, high=2**16
    )
    kept_clips: int = setting(
        0, "clips of pixels whose latents stay in memory, for data that repeat (data.scenes)", low=0, high=2**24
    )


@dataclass
class StivLoraSettings(LoraSettings):
    targets: list[str] = setting(list(LORA_TARGETS), "linear projections of every block that get adapters")


@dataclass
class StivTrainingSettings(TrainingSettings):
    """All settings of a run that trains STIV."""

    sampling = StivOptions

    lora: StivLoraSettings = setting(StivLoraSettings, "fine-tuning by low-rank adapters")
    init: InitSettings = setting(InitSettings, "models whose weights a model of model.preset begins with")
    latents: StivLatentSettings = setting(StivLatentSettings, "the latents that are modelled")
    text_encoder: str | None = setting(
        None,
        "small: trained along with the model, with the ids of tokenizer.text; folder: a frozen CLIP or T5 encoder, whose folder "
        "is tokenizer.text; null: that of the preset or the model",
        choices=(None, *TEXT_ENCODERS),
    )
    store_text_states: bool = setting(
        False, "store the states of a frozen text encoder beside the shards of data.path, and read them in place of running it"
    )
    flow: FlowSettings = setting(FlowSettings, "times and weights of the losses")
    patterns: dict[str, Any] = setting(
        {"none": 1.0}, f"shares of clips by the frames that are given, some of {', '.join(PATTERNS)} (published: first 1)"
    )
    strides: dict[Any, Any] = setting(
        {1: 1.0},
        "shares of clips by the sampling stride that the model is told, for keyframes of long clips; a synthetic scene has no "
        "frame rate of its own and stands for any (published: not stated)",
    )
    dropout: StivDropoutSettings = setting(StivDropoutSettings, "conditions that are left out at random")
    given_noise: float = setting(
        0.0, "largest level of noise in given frames, drawn for each clip (published: none)", low=0, below=1
    )
    mask_ratio: float = setting(
        0.0, "share of the places of a frame that only the last blocks see, for speed (MaskDiT; published 0.5)", low=0, below=1
    )
    masked_loss_weight: float = setting(0.1, "weight of the reconstruction of these places (MaskDiT 0.1)", low=0, high=100)
    saved_outputs: str = setting(
        "attention",
        "outputs that training.activation_checkpointing saves: attention, those of self-attention (published), or products, those "
        "of linear layers too, but of the first one of the MLP: less is computed again, and more memory is needed",
        choices=SAVED_OUTPUTS,
    )

    def check(self) -> None:
        """Raise UserError if fields contradict each other."""
        super().check()
        # Settings in JSON, such as those in a model's training.json, have text for keys.
        self.strides = {int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 9 else key: share
                        for key, share in self.strides.items()}  # fmt: skip
        for check in STIV_CHECKS:
            check(self)

    @classmethod
    def for_ingested(cls, sections: dict[str, Any], adapters: bool = False) -> dict[str, Any]:
        found = {name: value for name, value in sections.items() if name != "strides"}
        if isinstance(latents := found.get("latents"), dict):
            found["latents"] = latents | {"kept_clips": 0}
        return found


def check_init(settings: StivTrainingSettings) -> None:
    init = settings.init
    if init.temporal is not None and init.image is None:
        raise UserError("init.temporal needs init.image, the model for all other weights")
    if init.image is not None and settings.model.from_ is not None:
        raise UserError("init.image and model.from both say where weights come from; leave one of them out")


def check_flow(settings: StivTrainingSettings) -> None:
    flow, usual = settings.flow, FlowSettings()
    needs = {"mean": ("times", "logit_normal"), "std": ("times", "logit_normal"), "gamma": ("weighting", "min_snr")}
    for name, (needed, value) in needs.items():
        if getattr(flow, name) != getattr(usual, name) and getattr(flow, needed) != value:
            raise UserError(f"flow.{name} has no effect with flow.{needed}={getattr(flow, needed)}; leave it out, or set {value}")
    if flow.weighting != "none" and settings.model.overrides.get("prediction") == "noise":
        raise UserError("flow.weighting is for predictions of the velocity; set it to none with model.overrides.prediction=noise")
    if settings.mask_ratio == 0 and settings.masked_loss_weight != 0.1:
        raise UserError("masked_loss_weight has no effect with mask_ratio 0; set mask_ratio too, or leave it out")


def check_checkpointing(settings: StivTrainingSettings) -> None:
    if settings.saved_outputs != "attention" and not settings.training.activation_checkpointing:
        raise UserError("saved_outputs has no effect without training.activation_checkpointing; set it too, or leave it out")


def check_patterns(settings: StivTrainingSettings) -> None:
    check_named_shares("patterns", settings.patterns, PATTERNS)
    given = [name for name, share in settings.patterns.items() if share > 0 and name != "none"]
    if settings.given_noise and not given:
        raise UserError(f"given_noise {settings.given_noise} has no effect, because patterns give no frames; leave it out")


def check_strides(settings: StivTrainingSettings) -> None:
    for stride, share in settings.strides.items():
        if not isinstance(stride, int) or isinstance(stride, bool) or not 1 <= stride <= MAX_STRIDE:
            raise UserError(
                f"strides.{shown(stride)} is not allowed; give strides from 1 to {MAX_STRIDE}, for example {{1: 0.8, 16: 0.2}}"
            )
        if not is_number(share) or not 0 <= share <= 1e6:
            raise UserError(f"strides.{stride} {shown(share)} is not allowed; give a share from 0")
    if not sum(settings.strides.values()) > 0:
        raise UserError(f"strides {shown(settings.strides)} has no share above 0; give at least one, such as 1: 1")
    if settings.data.source != "worlds" and set(settings.strides) != {1}:
        raise UserError("strides has no effect on ingested clips, which have the stride of their videos; leave it out")


def check_attention(settings: StivTrainingSettings) -> None:
    if settings.training.attention is not None:
        raise UserError("training.attention has no effect on STIV, which always uses torch's attention; leave it out")
    if settings.data.pad_to != 1:
        raise UserError("data.pad_to has no effect on STIV, whose clips of one size need no padding; leave it out")


def check_latents(settings: StivTrainingSettings) -> None:
    latents = settings.latents
    if bool(latents.mean) != bool(latents.std):
        raise UserError("latents.mean and latents.std belong together; give both or none")
    if latents.kept_clips and settings.data.source != "worlds":
        raise UserError("latents.kept_clips has no effect on ingested clips, which hold codes; leave it out")


STIV_CHECKS = (check_init, check_flow, check_checkpointing, check_patterns, check_strides, check_attention, check_latents)
