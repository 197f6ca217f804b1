"""The part that the training tasks of all generators share: tokenizers, clips, adapters, previews, and the resume fingerprint."""

from __future__ import annotations

import bisect
import hashlib
import json
import warnings
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lumos.data.curriculum import Curriculum
from lumos.data.mixture import MixtureSource
from lumos.data.shards.remote import LocalCopies, is_url
from lumos.data.shards.source import ShardSource
from lumos.data.source import Source
from lumos.data.synthetic.source import SyntheticSource
from lumos.data.trained_on import TRAINED_ON_FILE, TrainedOn, read_trained_on
from lumos.errors import UserError, shown
from lumos.files import user_cache
from lumos.lora import Lora, add_adapters, sample, text_fingerprint
from lumos.pipeline.base import VideoPipeline
from lumos.pipeline.defaults import ClipDefaults, read_defaults
from lumos.pipeline.options import SamplingOptions
from lumos.runtime import no_progress_bar
from lumos.settings import to_plain
from lumos.training import checkpoint
from lumos.training.engine import pick_precision
from lumos.training.export import Tokenizers, export_checkpoint
from lumos.training.samples import Sampler
from lumos.training.settings import TrainingSettings
from lumos.training.task import TrainingTask
from tokenizer.fingerprint import network_fingerprint
from tokenizer.loading import REFERENCE, find_tokenizer_folder
from tokenizer.video import VideoTokenizer

DECISIVE_DATA = ("source", "options", "num_frames", "min_frames", "height", "width", "fps", "scenes", "stages")
OF_THE_FILE = ("dtype", "transformers_version", "architectures")
"""Fields of a config that describe how the file was written, not the model."""
TRAIN_VERBS = {"video": "train-tokenizer", "text": "train-text-tokenizer"}


class VideoTask(TrainingTask):
    """A task that trains a generator on the latents of clips.

    A video tokenizer encodes the clips on `device`. The subclass of a generator adds `size_unit`,
    the model and the losses.

    model_class, config_class  the network and its config, both of transformers
    not_of_weights             fields of the config in which two models may differ and still be mixed
    config                     the config of the model that is trained
    adapter                    with lora.rank: settings, base model and shapes of the adapters, for the checkpoint
    """

    model_class: ClassVar[type]
    config_class: ClassVar[type]
    not_of_weights: ClassVar[Collection[str]] = ()
    config: Any
    adapter: dict[str, Any] | None = None
    source: Source
    caption_was_cut = False
    per_frame_codes: bool = False
    """Whether clips of shards have the codes of single frames instead of those of the clip."""
    refused_untrained: ClassVar[Collection[str]]
    """The patterns of given frames that a model refuses unless it was trained on them."""
    needs_last_frame: bool = False
    """Whether clips have their last frame as a separate picture as well."""

    def __init__(self, settings: TrainingSettings, device: torch.device):
        self.settings, self.device = settings, device
        self.places = Tokenizers(self.tokenizer_folder("video"), self.tokenizer_folder("text"))
        self.video_tokenizer = self.read_network(self.places.video)
        self.fingerprints = {
            "video": network_fingerprint(self.video_tokenizer), "text": self.fingerprint_of(self.places.text, "text"),
        }  # fmt: skip
        self.identities = {
            "tokenizer.video (sha256)": video_tokenizer_sha256(self.video_tokenizer),
            "tokenizer.text (sha256)": self.fingerprints["text"],
        }
        self.video_tokenizer.to(device).eval().requires_grad_(False)
        self.check_tokenizers_of_base()

    def read_network(self, folder: str) -> nn.Module:
        """Return the network that encodes clips, from its folder."""
        return VideoTokenizer.from_pretrained(folder)

    @staticmethod
    def fingerprint_of(folder: str, kind: str) -> str:
        """Return the fingerprint of the tokenizer of a kind ("video", "text") in a folder."""
        if kind == "text":
            return text_fingerprint(folder)
        return network_fingerprint(VideoTokenizer.from_pretrained(folder))

    @property
    def base_folders(self) -> list[str]:
        """The model folders that the weights come from, which have tokenizers too."""
        return [self.settings.model.from_] if self.settings.model.from_ else []

    @staticmethod
    def part_of(folder: str, kind: str) -> Path:
        """Return where a model folder has its tokenizer of a kind ("video", "text")."""
        place = Path(folder) / f"{kind}_tokenizer"
        return find_tokenizer_folder(Path(folder)) if kind == "video" and (Path(folder) / REFERENCE).is_file() else place

    @property
    @abstractmethod
    def size_unit(self) -> int:
        """The number of pixels of which the height and the width of clips are multiples."""

    @property
    def compression(self) -> tuple[int, int]:
        """The frames of a latent frame (the first one has a single frame), and the pixels of a side of a latent place."""
        return 1 if self.per_frame_codes else self.video_tokenizer.temporal_compression, self.video_tokenizer.spatial_compression

    @property
    def sample_shape(self) -> ClipDefaults:
        """The shape of sample clips: the usual shape of the data; one frame if the run trains on pictures only."""
        data = self.settings.data
        pictures_only = Curriculum(data.stages, self.settings.training.batch_size).kinds == ["image"]
        shape = self.source.usual_shape | ({"num_frames": 1, "fps": 1} if pictures_only else {})
        return ClipDefaults(**shape, target_size=None)

    def fitting(self, caption: str, name: str, count: Callable[[str], int], limit: int) -> str:
        """Return the longest beginning of a clip's caption that has at most `limit` tokens, in whole words if it has spaces.

        Training therefore reads no text that generation would refuse. A warning names the first caption that is cut.
        `count` returns the number of tokens of a text.
        """
        if (tokens := count(caption)) <= limit:
            return caption
        if not self.caption_was_cut:
            self.caption_was_cut = True
            warnings.warn(
                f"the caption of {name} has {tokens} tokens, and the model reads at most {limit}: its beginning is used, for other "
                "captions that are too long too"
            )
        most = bisect.bisect_right(range(1, len(caption)), limit, key=lambda n: count(caption[:n]))
        beginning, next_character = caption[:most], caption[most]
        if not next_character.isspace() and " " in beginning:
            beginning = beginning.rpartition(" ")[0]
        return beginning.strip()

    @staticmethod
    def score_settings(config: Any) -> dict[str, Any]:
        """Return the sections of the settings with which compression scores a model of this config, beside the shared ones."""
        return {}

    def data_fingerprint(self) -> dict[str, Any]:
        """Return the shared part of the resume fingerprint: data, tokenizers and optimization.

        A run resumes a checkpoint only if these values are equal to those of the checkpoint.
        """
        data, training = self.settings.data, self.settings.training
        return (
            self.identities
            | {f"data.{key}": to_plain(getattr(data, key)) for key in DECISIVE_DATA}
            | {"data.replay": [to_plain(replay) | {"path": None} for replay in data.replay]}  # their content is in the identity
            | {f"training.{key}": getattr(training, key) for key in ("seed", "batch_size", "tokens_per_batch", "optimizer")}
            | self.source.identity
        )

    def fingerprint_defaults(self) -> dict[str, Any]:
        """Return the values that runs had before data.replay was a setting."""
        return {"data.replay": []}

    def config_fields(self) -> dict[str, Any]:
        """Return the fields of the config in the order of their names."""
        config = self.config.to_dict()
        return {key: config[key] for key in sorted(config) if key not in OF_THE_FILE}

    def lora_fingerprint(self) -> dict[str, Any]:
        """Return the part of the resume fingerprint that tells of adapters: their settings and the weights below them."""
        found = {f"lora.{key}": value for key, value in to_plain(self.settings.lora).items()}
        if self.adapter is not None:
            weights = hashlib.sha256(json.dumps(self.adapter["base"]["sample"]).encode()).hexdigest()
            found["model.from (sha256 of a sample)"] = weights
        return found

    def with_adapters(self, model: nn.Module) -> nn.Module:
        """Return the model with adapters, if lora.rank asks for them; all other weights are then frozen."""
        lora = self.settings.lora
        if lora.rank is not None:
            base = {"folder": self.settings.model.from_, "sample": sample(model)}
            add_adapters(model, Lora(**to_plain(lora)))
            shapes = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
            self.adapter = {"settings": to_plain(lora), "base": base, "shapes": shapes}
        return model

    def sampling_options(self) -> SamplingOptions:
        """Return the sampling options of the exported model: those of the base model, changed by the section generation."""
        kind, folder = type(self.settings).sampling, next(iter(self.base_folders), None)
        usual = kind() if folder is None else read_defaults(Path(folder), kind)[0]
        return usual.changed(**self.settings.generation)

    def warn_of_lost_patterns(self) -> None:
        """Warn of patterns that the model of `model.from` takes, and that the trained model will refuse."""
        folder = self.settings.model.from_
        if folder is None or self.settings.lora.rank is not None:  # an adapter leaves the config of its model as it is
            return
        now, before = self.config.patterns, self.read_config(Path(folder)).patterns
        if lost := [name for name in before if name in self.refused_untrained and name not in now]:
            warnings.warn(
                f"the new model will refuse clips of the patterns {', '.join(lost)}, which {folder} takes: this run trains on "
                f"{', '.join(now)} only; to keep them, give them a share in patterns"
            )

    def export_metadata(self) -> dict[str, Any]:
        """Return the values that `export_checkpoint` needs beside the weights, as JSON. Call after `build_model`."""
        return {
            "config": self.config_fields(),
            "tokenizers": vars(self.places),
            "fingerprints": self.fingerprints,
            "generation": vars(self.sampling_options()),
            "clip": {name: value for name, value in vars(self.sample_shape).items() if name != "target_size"},
            "lora": self.adapter,
            "records": {TRAINED_ON_FILE: self.trained_on.as_json()},
        }

    @cached_property
    def trained_on(self) -> TrainedOn:
        """The data that the model has been trained on at the end of the run, with the data of its base models."""
        found = self.source.trained_on()
        for base in self.base_folders:
            found = found.joined(read_trained_on(base))
        return found

    def export(self, folder: Path, target: Path) -> None:
        """Write a checkpoint as a folder that `VideoPipeline.from_pretrained` opens, or as an adapter folder (LoRA)."""
        export_checkpoint(folder, checkpoint.read_state(folder), target)

    @abstractmethod
    def pipeline_of(self, model: nn.Module, settings: SamplingOptions) -> VideoPipeline:
        """Return a pipeline of this model and the tokenizers of the run, whose clips have `sample_shape`."""

    def preview(self, weights: dict[str, Tensor]) -> Sampler:
        """Return a sampler that generates clips of `sample_shape` with the trained `weights`."""
        dtype = pick_precision(self.settings.training.precision, self.device)
        if self.adapter is None:
            model = model_with(self.model_class, weights, self.config, dtype)
        else:
            model = self.model_class.from_pretrained(self.settings.model.from_, config=self.config, dtype=dtype)
            add_adapters(model, Lora(**self.adapter["settings"]))
            model.load_state_dict(weights, strict=False)
        settings = self.sampling_options().changed(**self.settings.samples.options)
        pipe = self.pipeline_of(model.to(self.device), settings)
        return Sampler(
            lambda prompt, seed, on_step: pipe(prompt, seed=seed, output_type="uint8", on_step=on_step).frames[0],
            self.sample_shape.fps,
            {**vars(settings), **vars(self.sample_shape)},
        )

    @staticmethod
    @abstractmethod
    def write_folder(
        folder: Path, weights: dict[str, Tensor], metadata: Mapping[str, Any], tokenizers: Tokenizers, dtype: torch.dtype
    ) -> None:
        """Write a complete model folder, tokenizers included, that the generator's pipeline opens."""

    @classmethod
    def parameter_shapes(cls, metadata: Mapping[str, Any]) -> dict[str, torch.Size]:
        """Return the shapes of the model's parameters by name."""
        with torch.device("meta"):
            model = cls.model_class(cls.config_class(**metadata["config"]))
        return {name: p.shape for name, p in model.named_parameters()}

    @classmethod
    def read_config(cls, folder: Path) -> Any:
        """Return the config of a model folder. Raises UserError if it is damaged."""
        return cls.config_class.from_pretrained(folder)

    @classmethod
    def weights_to_mix(cls, folder: str, metadata: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return the parameters of a model folder by name, float32. Raises UserError for a model of another shape."""
        theirs, config = cls.read_config(Path(folder)), cls.config_class(**metadata["config"])
        for name in sorted(set(cls.config_class.__annotations__) - set(cls.not_of_weights) - {"model_type"}):
            found, wanted = getattr(theirs, name), getattr(config, name)
            if found != wanted:
                said = f"its {name} is {shown(found)}, not {shown(wanted)}"
                raise UserError(f"--mix {folder} is another model than the run's: {said}")
        with no_progress_bar():
            return dict(cls.model_class.from_pretrained(folder, dtype=torch.float32).named_parameters())

    def tokenizer_folder(self, kind: str) -> str:
        """Return the folder of the tokenizer of a kind ("video", "text").

        The folder is the one in the section tokenizer or, by default, the one inside the first of `base_folders`.
        Raises UserError if the settings name none or if it does not exist.
        """
        own = next((str(self.part_of(base, kind)) for base in self.base_folders), None)
        folder = getattr(self.settings.tokenizer, kind) or own
        if folder is None:
            raise UserError(f"tokenizer.{kind} is missing: name the folder of the {kind} tokenizer, or set model.from")
        if not Path(folder).exists():
            raise UserError(f"tokenizer.{kind}: there is no {folder}; train one with `python -m lumos {TRAIN_VERBS[kind]}`")
        return folder

    def check_tokenizers_of_base(self) -> None:
        """Raise UserError if the tokenizers are not those of the models that the weights come from.

        The codes of another tokenizer have other meanings, so the weights would be useless.
        """
        for base in self.base_folders:
            for kind, fingerprint in self.fingerprints.items():
                own, used = str(self.part_of(base, kind)), getattr(self.places, kind)
                if own != used and Path(own).is_dir() and self.fingerprint_of(own, kind) != fingerprint:
                    raise UserError(
                        f"tokenizer.{kind} {used} is another tokenizer than {own}, with which the weights of that model were "
                        f"trained; leave tokenizer.{kind} out"
                    )

    def make_source(self) -> Source:
        """Return the source of the clips that the settings name."""
        data = self.settings.data
        shape = {name: getattr(data, name) for name in ("num_frames", "height", "width", "fps")}
        if data.source == "worlds":
            main: Source = self.scenes(shape, data.options, data.scenes)
        else:
            main = self.shards(data.path, held_out=data.validation_clips if self.settings.training.eval_every else 0)
        if not data.replay:
            return main
        others = [
            self.scenes(main.usual_shape, replay.options) if replay.source == "worlds" else self.shards(replay.path)
            for replay in data.replay
        ]
        return MixtureSource(main, [(replay.share, source) for replay, source in zip(data.replay, others, strict=True)])

    def scenes(self, shape: dict[str, int], options: dict[str, Any], count: int | None = None) -> SyntheticSource:
        """Return a source of synthetic scenes; shape: num_frames, height, width and fps, count: how many there are."""
        temporal, spatial = self.compression
        picture = shape["height"] * shape["width"] // spatial**2
        codes = {"image": picture, "video": picture * (1 + (shape["num_frames"] - 1) // temporal + self.needs_last_frame)}
        return SyntheticSource(**shape, scenes=count, seed=self.settings.training.seed, options=options, most_codes=codes)

    def shards(self, path: str, held_out: int = 0) -> ShardSource:
        """Return a source of the clips of a folder of shards, without `held_out` of each kind."""
        data, training = self.settings.data, self.settings.training
        return ShardSource(
            path,
            self.video_tokenizer,
            kinds=Curriculum(data.stages, training.batch_size).kinds,
            num_frames=data.num_frames,
            min_frames=data.min_frames,
            size_unit=self.size_unit,
            size=data.size,
            per_frame=self.per_frame_codes,
            last_frame=self.needs_last_frame,
            seed=training.seed,
            held_out=held_out,
            shuffle_shards=data.shuffle_shards,
            copies=LocalCopies(data.cache_dir or user_cache("shards"), int(data.cache_gb * 1e9)) if is_url(path) else None,
        )


def video_tokenizer_sha256(tokenizer: nn.Module) -> str:
    """Return the SHA-256 of the config and float32 weights of a network that encodes clips.

    It does not depend on the files from which they were read.
    """
    config = tokenizer.config
    # The config of a diffusers network is a dict, and fields with a leading underscore say where it was read.
    fields = config.to_dict() if hasattr(config, "to_dict") else {key: config[key] for key in config if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def model_with(kind: type, weights: Mapping[str, Tensor], config: Any, dtype: torch.dtype) -> nn.Module:
    """Return a model of a class of transformers with the given weights, complete and by name, in the number format `dtype`."""
    with torch.device("meta"):
        model = kind(config)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)
    model.config.dtype = dtype
    return model
