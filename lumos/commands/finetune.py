"""`finetune`: train a model on a folder of clips: ingest, training and a sheet in one verb, which resumes where it stopped."""

from __future__ import annotations

import argparse
import shlex
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumos.cli import OVERRIDE, add_json
from lumos.commands import subcommands
from lumos.commands.finetune_inputs import Base, FinetuneClips, base_of, listed

if TYPE_CHECKING:
    from lumos.stages import Stages

MAX_STEPS = 10**8
MAX_CLIPS_OF_A_VIDEO = 10_000
SHEET_CLIPS = 6
LOW_PSNR, FAIR_PSNR = 25.0, 30.0
"""Below the first number of dB, a clip that the tokenizer encodes and decodes loses much; below the second, fine detail."""
REPLAY = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add = parser.add_argument
    add("source", metavar="CLIPS", help="folder of clips with captions; or csv / jsonl / parquet with path and caption, webdataset "
        "tar, or a single file, as for `ingest`")  # fmt: skip
    add("--out", required=True, help="folder of all results; the same command resumes where it stopped")
    add("--model", help="model folder to start from; default: the shipped one")
    add("--captions", help="csv / jsonl / parquet with path and caption, for a source without captions")
    add("--caption", help="the caption of all clips, in place of captions of their own")
    add("--clips-per-video", type=int, default=1, help="maximum number of clips of a video; default: 1, from its middle")
    add("--steps", type=int, default=300, help="training steps; default: %(default)s")
    add("--lora", action="store_true", help="train low-rank adapters in place of the whole model")
    add("--replay", type=float, metavar="SHARE", help="share of the steps that have the data of the model's own training, so that "
        f"it keeps what it knew; default: {REPLAY}, or 0 if these data are not known")  # fmt: skip
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--dry-run", action="store_true", help="say what would be done, and write nothing")
    add("overrides", nargs="*", metavar="section.key=value", help="settings of the training, for example training.lr=1e-4")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lumos.commands.counts import check_counts
    from lumos.errors import UserError, printable
    from lumos.files import read_json
    from lumos.progress import LOGGER
    from lumos.runtime import pick_device
    from lumos.training.finetuning import finetune_settings

    words = [args.source, *args.overrides]
    if len(plain := [word for word in words if not OVERRIDE.match(word)]) == 1:  # an override may stand before the clips
        args.source, args.overrides = plain[0], [word for word in words if OVERRIDE.match(word)]
    args.source = str(Path(args.source))  # clips/ and clips are the same for a run that is resumed
    args.captions = args.captions and str(Path(args.captions))
    check_counts(args, steps=(1, MAX_STEPS), clips_per_video=(1, MAX_CLIPS_OF_A_VIDEO))
    if args.replay is not None and not 0 <= args.replay < 1:
        raise UserError(f"--replay {args.replay:g} is not allowed; give a share from 0 to below 1")
    args.device, out = str(pick_device(device_of(args.device, args.overrides))), Path(args.out)
    base = base_of(args.model)
    clips = FinetuneClips(args, base, listed(args))
    replay, notes = share_of_replay(args.replay, base)
    settings = finetune_settings(
        base.generator, base.folder, base.clip, base.record, shards=out / "shards", out=out, steps=args.steps, lora=args.lora,
        replay=replay, parameters=base.parameters, dtype=base.dtype,
    )  # fmt: skip
    job = FinetuneJob(args, base, clips, settings, [*args.overrides, f"training.device={args.device.partition(':')[0]}"])
    job.check()
    print("\n".join(map(printable, plan(args, base, clips, settings))), flush=True)
    for note in notes:
        LOGGER.warning(printable(note))
    stored = out / "tokenizer.json"
    psnr = read_json(stored, "what the tokenizer holds")["psnr"] if stored.exists() else clips.psnr
    print(held_by_tokenizer(psnr))
    if args.dry_run:
        return {"finetune": args.out, "dry_run": True, "clips": len(clips.listing.usable), "psnr": psnr, "settings": settings}
    return job.run(psnr) | {"replay": replay, "psnr": psnr}


def device_of(asked: str | None, overrides: list[str]) -> str | None:
    """Return the device of --device, or that of an override; UserError if they differ."""
    from lumos.errors import UserError, shown

    names = [word.partition("=")[2] for word in overrides if word.startswith("training.device=")]
    if names and asked not in (None, names[-1]):
        raise UserError(f"--device {shown(asked)} and training.device={names[-1]} name two devices; give one of them")
    return names[-1] if names else asked


def share_of_replay(asked: float | None, base: Base) -> tuple[float, list[str]]:
    """Return the share of the steps with the data of the model's own training, and notes. UserError if it is not possible."""
    from lumos.errors import UserError
    from lumos.training.finetuning import own_data

    known, gone = own_data(base.record)
    if not known:
        why = f"{', '.join(gone)} is gone" if gone else f"no training.json in {base.folder} says what they were"
        if asked:
            raise UserError(f"--replay {asked:g} is not possible: the data of the model's own training are not known ({why})")
        return 0.0, [] if asked == 0 else [f"note: the model will forget much of what it knew: its own data are not known ({why})"]
    return REPLAY if asked is None else asked, [f"note: {folder}, of the model's own training, is gone" for folder in gone]


def plan(args: argparse.Namespace, base: Base, clips: FinetuneClips, settings: dict[str, Any]) -> list[str]:
    """Return the lines that say what will be done."""
    clip, training, replay = base.clip, settings["training"], settings["data"]["replay"]
    usable, all_items = len(clips.listing.usable), len(clips.listing.items)
    left_out = ", ".join(f"{reason} {count}" for reason, count in clips.listing.reasons.items())
    own = sum(source["share"] for source in replay)
    kinds = " and ".join("synthetic scenes" if source["source"] == "worlds" else source["path"] for source in replay)
    which = f" have the model's own data: {kinds}" if replay else ": it may forget what it knew"
    what, more = "adapters" if args.lora else "the whole model", f", with {' '.join(args.overrides)}" if args.overrides else ""
    return [
        f"model      {base.folder}  ({base.generator.name}, {base.parameters:,} parameters)",
        f"clips      {usable} of {all_items} items of {args.source}" + (f"; left out: {left_out}" if left_out else ""),
        f"shape      {clip.num_frames} frames of {clips.settings.size} at {clip.fps} fps, {clip.num_frames / clip.fps:.1f} s",
        f"training   {args.steps} steps of {training['batch_size']} clips, {what}, learning rate {training['lr']:g}{more}",
        f"replay     {own:.0%} of the steps{which}",
        f"result     {Path(args.out) / 'export'}, {Path(args.out) / 'sheet.png'}",
    ]


def held_by_tokenizer(psnr: float) -> str:
    """Return a line on how well the tokenizer represents the clips."""
    if psnr < LOW_PSNR:
        said = "it loses details, faces and text of these clips, and no training brings them back; large shapes and colors stay"
    elif psnr < FAIR_PSNR:
        said = "it loses fine details of these clips, and no training brings them back"
    else:
        said = "it represents these clips well"
    return f"tokenizer  PSNR {psnr:.1f} dB: {said}"


@dataclass(frozen=True)
class FinetuneJob:
    """The stages of a fine-tuning in its folder."""

    args: argparse.Namespace
    base: Base
    clips: FinetuneClips
    settings: dict[str, Any]
    overrides: list[str]

    @property
    def out(self) -> Path:
        return Path(self.args.out)

    @property
    def config(self) -> Path:
        return self.out / "finetune.yaml"

    @cached_property
    def stages(self) -> Stages:
        from lumos.stages import Stages

        return Stages(self.out)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        from lumos.files import folder_sha256

        return {"clips": self.clips.listing.digest, "clips_per_video": self.args.clips_per_video, "lora": self.args.lora,
                "model": folder_sha256(Path(self.base.folder)), "settings": self.settings}  # fmt: skip

    @cached_property
    def text(self) -> bytes:
        import yaml

        head = "# Written by `finetune`. An edited file is used as it is.\n"
        return (head + yaml.safe_dump(self.settings, sort_keys=False)).encode()

    def check(self) -> None:
        """Raise UserError for settings or clips that cannot be used, and for a folder of another run; nothing is written."""
        from lumos.data.shards.format import parquet
        from lumos.errors import UserError
        from lumos.files import check_writable, write_bytes
        from lumos.training.settings import load_settings

        parquet()
        if self.out.is_dir() and not self.stages.file.exists() and any(self.out.iterdir()):
            raise UserError(f"--out {self.out} holds something else than a fine-tuning; name another --out")
        if self.config.exists():
            self.stages.run("config", self.config, self.inputs, lambda: None)
            load_settings(self.config, self.overrides)
            return
        with tempfile.TemporaryDirectory(prefix="lumos-") as folder:
            load_settings(write_bytes(Path(folder) / self.config.name, self.text), self.overrides)
        if self.args.lora:
            from lumos.lora import import_peft

            import_peft()
        check_writable(self.config)
        _ = self.clips.some

    def run(self, psnr: float) -> dict[str, Any]:
        """Do the stages that are left; return what was made."""
        from lumos.errors import RunError, printable
        from lumos.files import file_sha256, folder_sha256, read_json, write_bytes, write_json
        from lumos.lora import is_adapter
        from lumos.progress import LOGGER
        from lumos.runtime import versions
        from lumos.training.settings import load_settings

        out, args, base = self.out, self.args, self.base
        self.stages.run("config", self.config, self.inputs, lambda: write_bytes(self.config, self.text))
        write_json(out / "tokenizer.json", {"psnr": psnr})
        shards, export = out / "shards", load_settings(self.config, self.overrides).output_dir / "export"
        self.typed("ingest", self.clips.ingest_words(shards), shards / "report.json", self.inputs)
        report = read_json(shards / "report.json", "the report of an ingest", 2**26)
        if skipped := report["skipped_items"]:
            reasons = ", ".join(f"{reason} {count}" for reason, count in report["reasons"].items())
            items = f"{skipped} of {report['items']} items are left out ({reasons})"
            LOGGER.warning(printable(f"note: {items}, see {shards / report['all_skipped']}"))
        self.typed("train", ["--config", self.config, *self.overrides], export, {"config": file_sha256(self.config)})
        if not export.exists():
            raise RunError(f"the training was stopped; the same command goes on from its last checkpoint in {out / 'checkpoints'}")
        sheet, sha256, adapter = out / "sheet.png", folder_sha256(export), str(export) if is_adapter(export) else None
        self.stages.run("sheet", sheet, {"export": sha256}, lambda: self.draw(sheet, export, adapter))
        print(printable(f"{sheet}  each clip, what the tokenizer keeps of it, and what the new model makes of its caption"))
        model = ["--model", base.folder, "--lora", adapter] if adapter else ["--model", str(export)]
        say = shlex.join([*model, "--prompt", self.clips.listing.usable[0].caption])
        print(printable(f"{export}  is the new {'adapter' if adapter else 'model'}: python -m lumos generate {say}"))
        summary = {
            "finetune": args.out, "export": str(export), "sheet": str(sheet), "model": base.folder, "lora": adapter is not None,
            "clips": report["clips"], "left_out": report["skipped_items"], "steps": args.steps, "sha256": sha256, **versions(),
        }  # fmt: skip
        write_json(out / "summary.json", summary)
        return summary

    def typed(self, verb: str, words: list[Any], result: Path, inputs: dict[str, Any]) -> None:
        """Run a verb as a user types it, unless its result is there."""
        from lumos.errors import printable
        from lumos.runtime import no_progress_bar

        words = list(map(str, words))
        print(printable(f"$ python -m lumos {shlex.join([verb, *words])}"), flush=True)
        with no_progress_bar():
            made = self.stages.run(verb, result, {"command": words, **inputs}, lambda: subcommands.typed(verb, words))
        if not made:
            print(printable(f"{result} is there already"))

    def draw(self, sheet: Path, export: Path, adapter: str | None) -> None:
        """Draw SHEET_CLIPS clips, those with different captions first: truth, reconstruction and result, one above the other."""
        import numpy as np

        from lumos.errors import UserError, printable, shown
        from lumos.pipeline.base import VideoPipeline
        from lumos.progress import LOGGER, progress_bar
        from lumos.runtime import no_progress_bar
        from lumos.video.frames import contact_sheet

        pairs = list(zip(self.clips.some, self.clips.kept, strict=True))
        captions = [caption for (caption, _), _ in pairs]
        order = sorted(range(len(pairs)), key=lambda i: (captions.index(captions[i]) != i, i))[:SHEET_CLIPS]
        folder = self.base.folder if adapter else str(export)
        with no_progress_bar():
            pipe = VideoPipeline.from_pretrained(folder, lora=adapter, device=self.args.device)
        drawn = []
        for number in progress_bar(order, desc="drawing the sheet", unit="clip", leave=False):
            (caption, frames), kept = pairs[number]
            height, width = frames.shape[1:3]
            try:
                made = pipe(caption, seed=number, height=height, width=width, output_type="uint8").frames[0]
            except UserError as error:  # training cuts a caption that generation refuses
                LOGGER.warning(printable(f"note: {sheet} has no result for {shown(caption, 60)}: {error}"))
                made = np.full_like(frames, 255)
            drawn.append(np.concatenate([frames, kept, made], axis=1))
        contact_sheet(drawn, [captions[number] for number in order], sheet, across=2 if len(drawn) > 1 else 1)
