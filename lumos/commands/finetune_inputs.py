"""The inputs of `finetune`: the model, and the clips, brought to the shape of the clips of the model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from lumos.data.ingest.encode import ClipSettings
    from lumos.data.ingest.preview import Listing
    from lumos.pipeline.defaults import ClipDefaults
    from lumos.registry import Generator
    from tokenizer import VideoTokenizer

CHECKED_CLIPS = 16
"""Clips that go through the video tokenizer before the training."""


def listed(args: argparse.Namespace) -> Listing:
    """Return the items of the source. Raises UserError if there are none, if none has a caption, and if --out is among them."""
    from lumos.data.ingest.item import NO_CAPTION
    from lumos.data.ingest.preview import list_items
    from lumos.errors import UserError

    found = list_items([args.source], args.captions, args.caption)
    if Path(args.source).is_dir() and Path(args.out).resolve().is_relative_to(Path(args.source).resolve()):
        raise UserError(f"--out {args.out} is inside of {args.source}, whose videos are the clips to train on; name another --out")
    if not found.items:
        raise UserError(f"there is no video in {args.source}; put clips into it, each with its caption in a .txt of the same name")
    if found.usable:
        return found
    if set(found.reasons) == {NO_CAPTION}:
        raise UserError(
            f"none of the {len(found.items)} clips of {args.source} has a caption; write it into name.txt beside each name.mp4, "
            'give a table with --captions, or say what all of them show with --caption "..."'
        )
    raise UserError(f"none of the {len(found.items)} clips of {args.source} can be used: {found.items[0].problem[1]}")


@dataclass(frozen=True)
class Base:
    """The model that is fine-tuned.

    folder      where it is
    clip        the shape of its clips
    parameters  how many it has
    dtype       the number format of its file
    record      what its training.json says; {}: nothing
    """

    folder: str
    generator: Generator
    clip: ClipDefaults
    parameters: int
    dtype: str
    record: dict[str, Any]

    @cached_property
    def tokenizer(self) -> VideoTokenizer:
        from tokenizer import VideoTokenizer

        return VideoTokenizer.from_pretrained(self.folder)


def base_of(model: str | None) -> Base:
    """Return the model of a folder, or the shipped one."""
    from lumos import registry
    from lumos.commands.info import stored_weights
    from lumos.pipeline.defaults import shipped_model
    from lumos.pipeline.hub import local_folder
    from lumos.training.record import training_record

    folder = Path(shipped_model()) if model is None else local_folder(model)
    generator = registry.generator_of(folder)
    _, _, clip = generator.load("cost", "clip").model_of(folder, None)
    parameters, dtypes = stored_weights(folder)
    return Base(str(folder), generator, clip, parameters, dtypes[0] if dtypes else "", training_record(folder))


@dataclass(frozen=True)
class FinetuneClips:
    """The clips to train on, in the shape of the model's clips."""

    args: argparse.Namespace
    base: Base
    listing: Listing

    @cached_property
    def settings(self) -> ClipSettings:
        from lumos.data.ingest.encode import ClipSettings
        from lumos.training.finetuning import clip_size

        clip = self.base.clip
        found = ClipSettings(clip.fps, clip_size(clip), clip.num_frames, None, self.args.clips_per_video, per_frame_codes=True)
        found.check(self.base.tokenizer)
        return found

    @cached_property
    def some(self) -> list[tuple[str, np.ndarray]]:
        """Up to CHECKED_CLIPS clips, (caption, frames uint8 [T, H, W, 3]). UserError if no item has a clip."""
        from lumos.data.ingest.preview import some_clips
        from lumos.errors import UserError

        wanted, found = self.settings, self.listing.usable
        clips, skipped = some_clips(found, wanted, self.base.tokenizer.temporal_compression, CHECKED_CLIPS)
        if not clips:
            raise UserError(
                f"none of the {len(found)} clips of {self.args.source} can be used; the first: {skipped[0].detail} (the model "
                f"makes {wanted.num_frames} frames at {wanted.fps} fps, which are {wanted.num_frames / wanted.fps:.1f} seconds)"
            )
        return clips

    @cached_property
    def kept(self) -> list[np.ndarray]:
        """The frames of `some` that the tokenizer encodes and decodes."""
        from lumos.evaluation.reconstruction import reconstruct

        return reconstruct(self.base.tokenizer.to(self.args.device), [frames for _, frames in self.some], 1).frames

    @cached_property
    def psnr(self) -> float:
        """The mean PSNR of `kept`, in dB."""
        import numpy as np

        from lumos.evaluation.quality import MAX_PSNR
        from lumos.video.frames import psnr

        found = [psnr(frames, kept) for (_, frames), kept in zip(self.some, self.kept, strict=True)]
        return round(float(np.mean([min(dB, MAX_PSNR) for dB in found])), 2)

    def ingest_words(self, shards: Path) -> list[Any]:
        """Return what follows `ingest` on the command line."""
        args, wanted = self.args, self.settings
        captions = [["--captions", args.captions], ["--caption", args.caption]]
        return [
            args.source, "--out", shards, "--tokenizer", self.base.folder, "--fps", wanted.fps, "--size", wanted.size, "--frames",
            wanted.num_frames, "--clips-per-video", wanted.clips_per_video, "--per-frame-codes", "--max-failure-rate", 1,
            "--device", args.device, *(word for words in captions if words[1] is not None for word in words),
        ]  # fmt: skip
