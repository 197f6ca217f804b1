"""`evaluate views`: PSNR and SSIM of the views of solids that a model makes from one view, beside those of copying that view."""

from __future__ import annotations

import argparse
import time
from typing import Any

from lumos.cli import add_json
from lumos.commands.counts import MAX_BATCH, MAX_CLIPS, MAX_SEED, check_counts
from lumos.commands.loading import add_device, load, model_sha256
from lumos.pipeline.options import add_acceleration, add_flags, all_options, given_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add = parser.add_argument
    add("--model", required=True, help="folder of a model that was trained on views")
    add("--kinds", nargs="+", default=["solids", "held_out_solids"],
        help="solids: combinations of shape and colours that training shows; held_out_solids: others; default: both")  # fmt: skip
    add("--count", type=int, default=50, help="solids of each kind; default: %(default)s")
    add("--seed", type=int, default=1_000_000, help="seed of the solids and of the views; training uses other seeds")
    add("--batch-size", type=int, default=10, help="solids in a batch; default: %(default)s")
    add_flags(parser, all_options())
    add("--reference", choices=("reconstruction",), help="measure the true views after the tokenizer, in place of generated ones")
    add("--sheet", help="PNG with the views of the first solids: true ones above, generated ones below")
    add("--sheet-solids", type=int, help="solids of each kind on the sheet; default: 4")
    add("--output", help="JSON file for the settings and the figures")
    add_device(parser)
    add_acceleration(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lumos.errors import UserError, printable
    from lumos.evaluation.prompts import generate_in_batches
    from lumos.evaluation.views import check_solid_kinds, solid_set, view_quality
    from lumos.files import check_outputs, write_json
    from lumos.pipeline.inputs import override
    from lumos.progress import progress_bar
    from lumos.runtime import versions
    from lumos.video.frames import contact_sheet

    check_counts(args, count=(1, MAX_CLIPS), batch_size=(1, MAX_BATCH), sheet_solids=(1, MAX_CLIPS), seed=(0, MAX_SEED))
    options = given_options(args, all_options())
    if args.reference and options:
        raise UserError(f"--{next(iter(options)).replace('_', '-')} has no effect with --reference {args.reference}; leave it out")
    if args.sheet_solids is not None and not args.sheet:
        raise UserError("--sheet-solids has no effect without --sheet; name one, or leave it out")
    check_outputs([args.sheet], [args.output])
    check_solid_kinds(args.kinds)
    pipe, model = load(args)
    used = vars(override(pipe.settings, **options)).copy()
    shape = {"height": pipe.clip.height, "width": pipe.clip.width}

    def make(prompts: list[str], seeds: list[int], truth: list) -> list:
        pictures = [views[0] for views in truth]
        made = pipe(prompts, seed=seeds, image=pictures, views=True, output_type="uint8", **options)
        used.update((name, made.settings[name]) for name in used)  # views have defaults of their own
        bar.update(len(prompts))
        return made.frames

    figures, shown_views, labels = {}, [], []
    started = time.perf_counter()
    with progress_bar(total=len(args.kinds) * args.count, unit="clip", desc="clips to judge") as bar:
        for kind in args.kinds:
            captions, truth, solids = zip(*solid_set(kind, args.count, args.seed, **shape), strict=True)
            if args.reference:
                made = [pipe.reconstruct(views) for views in truth]
                bar.update(len(made))
            else:
                made = generate_in_batches(make, args.seed, args.batch_size, captions, truth)
            figures[kind] = view_quality(made, truth)
            for views, ours, solid in list(zip(truth, made, solids, strict=True))[: args.sheet_solids or 4]:
                shown_views += [views, ours]
                labels += [f"true views of a {solid.shape}", args.reference or "generated"]
            print(f"{kind:16}{args.count:5} solids  " + "  ".join(
                f"{name}: {of['psnr']:.2f} dB, SSIM {of['ssim']:.3f}" for name, of in figures[kind].items()))  # fmt: skip
    summary = {
        "evaluate": "views", "model": model, "model_sha256": model_sha256(model, args), "reference": args.reference,
        "count": args.count, "seed": args.seed, **shape, "settings": used,
        "dtype": str(pipe.model.dtype).removeprefix("torch."), "int8": args.int8, "compile": args.compile,
        "seconds": round(time.perf_counter() - started, 1), "quality": figures, "versions": versions(),
    }  # fmt: skip
    if args.output:
        write_json(args.output, summary)
    if args.sheet:
        print(printable(str(contact_sheet(shown_views, labels, args.sheet, cell=80, across=1, columns=7))))
    return summary
