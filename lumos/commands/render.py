"""`render`: write mp4 clips of synthetic scenes, each with its caption in a .txt of the same name, as input for `ingest`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lumos.cli import add_json
from lumos.commands.counts import MAX_CLIPS, MAX_SEED, check_counts

SHEET_CLIPS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add = parser.add_argument
    add("--out", required=True, help="folder to write into; it must not exist yet")
    add("--count", type=int, default=20, help="number of clips; default: %(default)s")
    add(
        "--kind", default="one",
        help="as in evaluate prompts: one, two, digits, sprites, held_out, ...; or views of solids, without a caption: solids, "
        "held_out_solids; default: %(default)s",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="seed of the scenes; default: %(default)s")
    add("--num-frames", type=int, help="frames of a clip; default: 17, or the 7 views of a solid")
    add("--height", type=int, default=64, help="pixels; default: %(default)s")
    add("--width", type=int, default=64, help="pixels; default: %(default)s")
    add("--sheet", help=f"PNG with the frames of the first {SHEET_CLIPS} clips, to look at")
    add("--fps", type=int, default=8, help="frames per second; default: %(default)s")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lumos.data.synthetic.scene import NUM_VIEWS
    from lumos.errors import RunError, printable
    from lumos.evaluation.prompts import prompt_set
    from lumos.evaluation.views import SOLID_KINDS, solid_set
    from lumos.files import check_new, check_outputs, replacing_folder
    from lumos.video.frames import contact_sheet
    from lumos.video.io import write_video

    out = Path(args.out)
    check_new(out)
    check_outputs([args.sheet], [args.out])
    check_counts(args, count=(1, MAX_CLIPS), seed=(0, MAX_SEED))
    shape = {name: getattr(args, name) for name in ("num_frames", "height", "width", "fps")}
    if args.num_frames is None:
        shape["num_frames"] = NUM_VIEWS if args.kind in SOLID_KINDS else 17
    make = solid_set if args.kind in SOLID_KINDS else prompt_set
    clips = make(args.kind, args.count, args.seed, **shape)
    with replacing_folder(out) as folder:
        for number, (caption, frames, _) in enumerate(clips):
            write_video(folder / f"{number:05d}.mp4", frames, args.fps)
            (folder / f"{number:05d}.txt").write_text(caption + "\n", encoding="utf-8")
        for kind in ("mp4", "txt"):
            if (written := len(list(folder.glob(f"*.{kind}")))) != args.count:
                raise RunError(f"{args.count} clips must be written, but there are {written} {kind} files; run it again")
    print(printable(f"{out}  {args.count} clips"))
    if args.sheet:
        shown = clips[:SHEET_CLIPS]
        labels = [caption or about.title for caption, _, about in shown]
        print(printable(str(contact_sheet([frames for _, frames, _ in shown], labels, args.sheet, columns=NUM_VIEWS))))
    return {"out": str(out), "kind": args.kind, "count": args.count, "seed": args.seed, **shape}
