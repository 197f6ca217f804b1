"""`evaluate prompts`: share of prompts about synthetic scenes that a model follows, decided from the pixels of its clips."""

from __future__ import annotations

import argparse
import time
from typing import Any

from lumos.cli import add_json
from lumos.commands.counts import MAX_BATCH, MAX_CLIPS, MAX_SEED, check_counts
from lumos.commands.loading import add_device, load, model_sha256
from lumos.pipeline.options import add_acceleration, add_flags, all_options, given_options

SUMS = ("all", "colour_and_motion", "last_frame", "steady", "moving")
"""Keys of a verdict that are not about what the prompt says, or follow from other keys."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add = parser.add_argument
    add("--model", help="model folder; default: the shipped one")
    add("--kinds", nargs="+", default=["one"], help="kinds of prompts: one, two, two_ways, digits, sprites, two_sprites, held_out, "
        "held_out_sprites, paraphrased; default: one")  # fmt: skip
    add("--count", type=int, default=50, help="prompts of each kind; default: %(default)s")
    add("--seed", type=int, default=1_000_000, help="seed of the prompts and of the clips; training uses other seeds")
    add("--num-frames", type=int, help="frames of a clip; default: as the model generates")
    add("--image-to-video", action="store_true", help="begin each clip with the first frame of the rendered scene")
    add("--given", metavar="PATTERN", help="frames of the rendered scene that are given: first (as --image-to-video), the first "
        "few (prediction), the first and the last (ends), every second one (interpolation)")  # fmt: skip
    add("--batch-size", type=int, help="clips in a batch; default: 10")
    add_flags(parser, all_options())
    add("--frechet", action="store_true", help="also measure the Fréchet distance between generated and rendered clips, in "
        "features of the model's own video tokenizer")  # fmt: skip
    add("--reference", choices=("truth", "reconstruction"),
        help="check rendered clips (truth) or their reconstruction by the tokenizer, in place of generated clips")  # fmt: skip
    add("--sheet", help="PNG with the first clips of each kind, each with its prompt and the verdict")
    add("--animation", help=".webp or .gif that plays the same clips side by side with their prompts")
    add("--sheet-clips", type=int, help="clips of each kind on the sheet and in the animation; default: 12")
    add("--output", help="JSON file for the settings, the shares and the verdict of every clip")
    add_device(parser)
    add_acceleration(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lumos.errors import UserError, printable
    from lumos.evaluation.distances import distances
    from lumos.evaluation.given import arguments_of, given_numbers, is_kept, made_quality, reconstructed
    from lumos.evaluation.prompts import check_kinds, generate_in_batches, moved, moving, prompt_set, score, shares
    from lumos.files import check_outputs, write_json
    from lumos.pipeline.frechet import FEATURES
    from lumos.pipeline.inputs import check_num_frames, override
    from lumos.progress import progress_bar
    from lumos.runtime import peak_memory_bytes, versions
    from lumos.video.frames import animated_sheet, check_animated, contact_sheet

    check_counts(args, count=(1, MAX_CLIPS), batch_size=(1, MAX_BATCH), sheet_clips=(1, MAX_CLIPS), seed=(0, MAX_SEED))
    options = given_options(args, all_options())
    given = [*options, *(name for name in ("image_to_video", "given", "batch_size") if getattr(args, name))]
    if args.reference and given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{flags} has no effect with --reference {args.reference}; leave it out")
    if args.sheet_clips is not None and not args.sheet and not args.animation:
        raise UserError("--sheet-clips has no effect without --sheet or --animation; name one, or leave it out")
    if args.image_to_video and args.given not in (None, "first"):
        raise UserError(f"--image-to-video is --given first, and --given {args.given} is asked for too; give one of them")
    pattern = "first" if args.image_to_video else args.given
    if args.mask_given_frames and not pattern:
        raise UserError("--mask-given-frames has no effect without --image-to-video; add it, or leave it out")
    check_outputs([args.sheet], [args.animation, args.output])
    if args.animation:
        check_animated(args.animation)
    check_kinds(args.kinds, args.num_frames)
    pipe, model = load(args)
    if args.frechet and args.count < 2:
        raise UserError("--frechet needs at least 2 clips of each kind; give a larger --count")
    sampling = override(pipe.settings, **options)
    form = override(pipe.clip, num_frames=args.num_frames)
    check_num_frames(form.num_frames, pipe.temporal_compression)
    numbers = given_numbers(pattern, form.num_frames, pipe.temporal_compression) if pattern else []
    shape = {name: getattr(form, name) for name in ("num_frames", "fps", "height", "width")}

    def make(prompts: list[str], seeds: list[int], scenes: list | None) -> list:
        given = {} if scenes is None else arguments_of(pattern, scenes, numbers)
        frames = pipe(prompts, seed=seeds, num_frames=form.num_frames, output_type="uint8", **given, **options).frames
        bar.update(len(prompts))
        return frames

    results, clips_shown, labels = {}, [], []
    started, cpu_started = time.perf_counter(), time.process_time()
    with progress_bar(total=len(args.kinds) * args.count, unit="clip", desc="clips to judge") as bar:
        for kind in args.kinds:
            prompts, truth, wanted = zip(*prompt_set(kind, args.count, args.seed, **shape), strict=True)
            if args.reference:
                clips = [clip if args.reference == "truth" else pipe.reconstruct(clip) for clip in truth]
                bar.update(len(clips))
            else:
                clips = generate_in_batches(make, args.seed, args.batch_size or 10, prompts, list(truth) if pattern else None)
            _, verdicts = score(clips, wanted)
            if pattern:
                name = "first_frame" if pattern == "first" else "given_frames"
                for made, drawn, verdict in zip(clips, truth, verdicts, strict=True):
                    seen = reconstructed(pipe.reconstruct, drawn, numbers)
                    verdict[name] = all(is_kept(made[n], picture) for n, picture in zip(numbers, seen, strict=True))
            if form.num_frames > 1:
                for made, drawn, verdict in zip(clips, truth, verdicts, strict=True):
                    verdict |= moving(made, drawn)
            found = shares(verdicts) | ({"moved": moved(clips, truth)} if form.num_frames > 1 else {})
            if args.frechet:
                found |= distances(pipe, clips, truth)
            if pattern not in (None, "first"):
                found |= made_quality(clips, truth, numbers, [pipe.reconstruct(clip) for clip in truth])
            results[kind] = {"shares": found, "clips": [{"prompt": p, **v} for p, v in zip(prompts, verdicts, strict=True)]}
            for prompt, verdict, clip in list(zip(prompts, verdicts, clips, strict=True))[: args.sheet_clips or 12]:
                wrong = [name for name, right in verdict.items() if not right and name not in SUMS]
                clips_shown.append(clip)
                labels.append(f"{'wrong: ' + ', '.join(wrong) if wrong else 'right'} | {prompt}")
            print(f"{kind:12}{args.count:5} prompts  " + "  ".join(f"{name} {share:.2f}" for name, share in found.items()))
    summary = {
        "evaluate": "prompts", "model": model, "model_sha256": model_sha256(model, args), "reference": args.reference,
        "count": args.count, "seed": args.seed, **shape, "image_to_video": pattern == "first",
        "given": pattern,
        "settings": {**vars(pipe.settings), **options}, "dtype": str(pipe.model.dtype).removeprefix("torch."),
        "int8": args.int8, "compile": args.compile, "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu_started, 1),
        "shares": {kind: result["shares"] for kind, result in results.items()}, "versions": versions(),
    }  # fmt: skip
    summary |= {"frechet_features": FEATURES} if args.frechet else {}
    if not args.reference:
        summary["peak_memory_mb"] = round(peak_memory_bytes(pipe.device) / 2**20)
        summary |= {} if pattern else {"clip_flops": clip_flops(pipe, form, sampling, prompts[0])}
    if args.output:
        write_json(args.output, {**summary, "clips": {kind: result["clips"] for kind, result in results.items()}})
    if args.sheet:
        print(printable(str(contact_sheet(clips_shown, labels, args.sheet, cell=80, across=2))))
    if args.animation:
        captions = [label.partition(" | ")[2] for label in labels]
        print(printable(str(animated_sheet(clips_shown, captions, args.animation, form.fps))))
    return summary


def clip_flops(pipe: Any, form: Any, sampling: Any, prompt: str) -> float:
    """Return the FLOPs of the network for one clip from a prompt, by arithmetic, without the networks of latents."""
    from lumos import registry

    cost = registry.generator(pipe.generator).load("cost", "clip")
    plan = cost.clip_cost(pipe.model.config, form, sampling, pipe.prompt_tokens(prompt, form), pipe.dtype)
    return plan.report(1.0, 1.0)["flops"]["total"]
