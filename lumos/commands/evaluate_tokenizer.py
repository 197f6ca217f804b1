"""`evaluate tokenizer`: reconstruction quality of a video tokenizer (PSNR, SSIM, LPIPS), its use of codes, bits and speed."""

from __future__ import annotations

import argparse
import time
from typing import Any

from lumos.cli import add_json
from lumos.commands.counts import MAX_BATCH, MAX_CLIPS, MAX_SEED, check_counts

SHEET_CELL = (80, 256)
"""The least and the greatest width of a frame on the sheet in pixels; frames of a width between have their own size."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add = parser.add_argument
    add("--tokenizer", help="tokenizer folder, or a model folder that holds one; default: the shipped model")
    add("--data", nargs="+", required=True, metavar="SOURCE",
        help="worlds (synthetic scenes), sprites, photographs, films (none used in training), or your own folders and files",
    )  # fmt: skip
    add("--count", type=int, default=50, help="maximum number of clips of each source; default: %(default)s")
    add("--num-frames", type=int, help="frames of a clip, 1 + a multiple of the temporal compression; default: the shipped model's")
    add("--height", type=int, help="pixels; default: a height with as many codes as a clip of the shipped model has")
    add("--width", type=int, help="pixels; default: a width with as many codes as a clip of the shipped model has")
    add("--seed", type=int, default=1_000_000, help="seed of the synthetic scenes, and of the choice among more than --count files")
    add("--batch-size", type=int, default=4, help="clips in a batch; default: %(default)s")
    add("--lpips", metavar="FOLDER", help="folder with the two weight files of LPIPS; default: the folders of their packages")
    add("--sheet", help="PNG with the first clips of each source, each original above its reconstruction")
    add("--sheet-clips", type=int, help="clips of each source on the sheet; default: 6")
    add("--output", help="JSON file for all figures and the PSNR of every clip")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    import torch

    from lumos import registry
    from lumos.errors import UserError, printable
    from lumos.evaluation.quality import SSIM_SIDE
    from lumos.evaluation.reconstruction import code_figures, reconstruct
    from lumos.evaluation.sources import check_source, read_source
    from lumos.files import check_outputs, write_json
    from lumos.pipeline.defaults import MAX_FRAMES, MAX_SIDE, shipped_model
    from lumos.progress import LOGGER, progress_bar
    from lumos.runtime import peak_memory_bytes, pick_device, versions
    from lumos.training.tokenizer import lpips
    from lumos.video.io import contact_sheet
    from tokenizer import VideoTokenizer

    if args.sheet_clips is not None and not args.sheet:
        raise UserError("--sheet-clips has no effect without --sheet; name the PNG, or leave it out")
    sheet_clips = 6 if args.sheet_clips is None else args.sheet_clips
    check_counts(
        args, count=(1, MAX_CLIPS), batch_size=(1, MAX_BATCH), sheet_clips=(1, MAX_CLIPS), seed=(0, MAX_SEED), height=(1, MAX_SIDE),
        width=(1, MAX_SIDE), num_frames=(1, MAX_FRAMES),
    )  # fmt: skip
    for source in args.data:
        check_source(source)
    if len(set(args.data)) < len(args.data):
        raise UserError(f"--data {' '.join(args.data)} names a source twice; name it once")
    check_outputs([args.sheet], [args.output])
    folder, device = args.tokenizer or shipped_model(), pick_device(args.device)
    tokenizer = VideoTokenizer.from_pretrained(folder, dtype=getattr(torch, args.dtype), device=device)
    tokenizer.check_has_codes("evaluate tokenizer")
    config, _, clip = registry.generator_of(shipped_model()).load("cost", "clip").model_of(shipped_model(), None)
    clip = clip.scaled(tokenizer.spatial_compression, config.spatial_compression)
    shape = {name: getattr(clip if getattr(args, name) is None else args, name) for name in ("num_frames", "height", "width")}
    tokenizer.check_num_frames(shape["num_frames"])
    tokenizer.check_size(torch.empty(1, 3, 0, shape["height"], shape["width"]))
    if min(shape["height"], shape["width"]) < SSIM_SIDE:
        raise UserError(f"{shape['height']} x {shape['width']} pixels cannot be measured; SSIM needs {SSIM_SIDE} x {SSIM_SIDE}")
    perceived = lpips.load(args.lpips, shape["height"], shape["width"], device)
    not_measured = perceived if isinstance(perceived, str) else None

    data = {}
    for source in args.data:
        data[source], left_out = read_source(source, count=args.count, seed=args.seed, **shape)
        for why in left_out:
            LOGGER.warning(printable(f"note: left out of {source}: {why}"))
    if not_measured:
        print(printable(f"LPIPS not measured: {not_measured}"))
    rows, quality, shown, labels = {}, {}, [], []
    counts = np.zeros(tokenizer.num_codes, dtype=np.int64)
    started = time.perf_counter()
    with progress_bar(total=sum(map(len, data.values())), unit="clip", desc="measuring", leave=False) as bar:
        for source, clips in data.items():
            back = reconstruct(tokenizer, clips, args.batch_size, None if not_measured else perceived, bar.update)
            rows[source], quality[source] = back.figures, back.psnr
            counts += back.counts
            for original, result, dB in list(zip(clips, back.frames, back.psnr, strict=True))[:sheet_clips]:
                shown.append(np.concatenate([original, result], axis=1))
                labels.append(f"{source}: {dB:.1f} dB")
    for source, row in rows.items():
        print(f"{printable(source):12}  {line(row)}")
    union = code_figures(counts)
    if len(rows) > 1:
        print(f"{'union':12}  {union['codes']} codes, {union['codes_used']:.1%} of all used, perplexity {union['code_perplexity']}")
    if args.sheet:
        cell = min(max(SHEET_CELL), max(min(SHEET_CELL), shape["width"]))
        print(printable(str(contact_sheet(shown, labels, args.sheet, cell=cell, across=2))))
    summary = {
        "evaluate": "tokenizer", "tokenizer": str(folder), "num_codes": tokenizer.num_codes, **shape, "count": args.count,
        "seed": args.seed, "batch_size": args.batch_size, "device": str(device), "dtype": args.dtype,
        "threads": torch.get_num_threads(), "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_mb": round(peak_memory_bytes(device) / 2**20),
        "lpips": f"not measured: {not_measured}" if not_measured else "measured", "data": rows, "union": union,
        "versions": versions(),
    }  # fmt: skip
    if args.output:
        write_json(args.output, {**summary, "psnr_of_each_clip": {k: [round(v, 3) for v in vs] for k, vs in quality.items()}})
    return summary


def line(row: dict) -> str:
    """Return the figures of one source as a line of text."""
    perceived = "" if row["lpips"] is None else f"  LPIPS {row['lpips']:.3f}"
    speed = ", ".join(
        f"{what} {row[f'{what}_clips_per_second']:.1f} clips/s = {row[f'{what}_pixels_per_second'] / 1e6:.2f} Mpixel/s"
        for what in ("encode", "decode")
    )
    return (
        f"{row['clips']} clips  PSNR {row['psnr']:.2f} dB  SSIM {row['ssim']:.3f}{perceived}  codes used "
        f"{row['codes_used']:.1%}, perplexity {row['code_perplexity']:.1f}  {row['bits_per_pixel']:.3f} bits/pixel  {speed}"
    )
