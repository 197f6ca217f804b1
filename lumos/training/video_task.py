"""The part that the training tasks of all generators share: tokenizers, clips, and the resume fingerprint."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lumos.data.curriculum import Curriculum
from lumos.data.shards.remote import LocalCopies, is_url
from lumos.data.shards.source import ShardSource
from lumos.data.source import Source
from lumos.data.synthetic.source import SyntheticSource
from lumos.errors import UserError
from lumos.files import user_cache
from lumos.lora import text_fingerprint
from lumos.pipeline.defaults import ClipDefaults
from lumos.settings import to_plain
from lumos.training.export import Tokenizers
from lumos.training.settings import TrainingSettings
from lumos.training.task import TrainingTask
from tokenizer.fingerprint import tokenizer_facts
from tokenizer.video import VideoTokenizer

DECISIVE_DATA = ("source", "options", "num_frames", "min_frames", "height", "width", "fps", "scenes", "stages")
TRAIN_VERBS = {"video": "train-tokenizer", "text": "train-text-tokenizer"}


class VideoTask(TrainingTask):
    """A task that trains a generator on the latents of clips.

    A video tokenizer encodes the clips on `device`. The subclass of a generator adds `size_unit`,
    the model and the losses.
    """

    source: Source
    per_frame_codes: bool = False
    """Whether clips of shards have the codes of single frames instead of those of the clip."""

    def __init__(self, settings: TrainingSettings, device: torch.device):
        self.settings, self.device = settings, device
        self.places = Tokenizers(self.tokenizer_folder("video"), self.tokenizer_folder("text"))
        self.video_tokenizer = self.read_network(self.places.video)
        self.fingerprints = {kind: self.fingerprint_of(getattr(self.places, kind), kind) for kind in ("video", "text")}
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
        return tokenizer_facts(VideoTokenizer.from_pretrained(folder))["fingerprint"]

    @property
    def base_folders(self) -> list[str]:
        """The model folders that the weights come from, which have tokenizers too."""
        return [self.settings.model.from_] if self.settings.model.from_ else []

    @staticmethod
    def part_of(folder: str, kind: str) -> Path:
        """Return where a model folder has its tokenizer of a kind ("video", "text")."""
        return Path(folder) / f"{kind}_tokenizer"

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

    def data_fingerprint(self) -> dict[str, Any]:
        """Return the shared part of the resume fingerprint: data, tokenizers and optimization.

        A run resumes a checkpoint only if these values are equal to those of the checkpoint.
        """
        data, training = self.settings.data, self.settings.training
        return (
            self.identities
            | {f"data.{key}": to_plain(getattr(data, key)) for key in DECISIVE_DATA}
            | {f"training.{key}": getattr(training, key) for key in ("seed", "batch_size", "tokens_per_batch", "optimizer")}
            | self.source.identity
        )

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
        data, training = self.settings.data, self.settings.training
        if data.source == "worlds":
            shape = {"height": data.height, "width": data.width, "num_frames": data.num_frames, "fps": data.fps}
            temporal, spatial = self.compression
            picture = data.height * data.width // spatial**2
            latent_frames = 1 + (data.num_frames - 1) // temporal
            codes = {"image": picture, "video": picture * latent_frames}
            return SyntheticSource(**shape, scenes=data.scenes, seed=training.seed, options=data.options, most_codes=codes)
        return ShardSource(
            data.path,
            self.video_tokenizer,
            kinds=Curriculum(data.stages, training.batch_size).kinds,
            num_frames=data.num_frames,
            min_frames=data.min_frames,
            size_unit=self.size_unit,
            size=data.size,
            per_frame=self.per_frame_codes,
            seed=training.seed,
            held_out=data.validation_clips if training.eval_every else 0,
            shuffle_shards=data.shuffle_shards,
            copies=LocalCopies(data.cache_dir or user_cache("shards"), int(data.cache_gb * 1e9)) if is_url(data.path) else None,
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
