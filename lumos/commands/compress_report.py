"""`compress report`: models before, after pruning and after recovery in one table: size, seconds of a clip, prompts followed."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumos.cli import add_json
from lumos.commands.counts import MAX_BATCH, MAX_CLIPS, MAX_SEED, check_counts

if TYPE_CHECKING:
    from lumos.compression.networks import GeneratorNetwork
    from lumos.pipeline.base import VideoPipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="MODEL", help="model folders; the first is the one to compare with")
    add("--kinds", nargs="+", default=["one", "digits", "held_out", "two"],
        help="kinds of prompts, as for `evaluate prompts`; default: one digits held_out two")  # fmt: skip
    add("--count", type=int, default=50, help="prompts of each kind; default: %(default)s")
    add("--seed", type=int, default=1_000_000, help="seed of the prompts and of the clips; training uses other seeds")
    add("--batch-size", type=int, default=10, help="clips in a batch of the evaluation; default: %(default)s")
    add("--clips", type=int, default=16, help="held-out clips whose losses are measured; default: %(default)s")
    add("--repetitions", type=int, default=5, help="measured clips of each model, one at a time, the models in turn; default: 5")
    add("--output", default="report.json", help="JSON file for all figures; default: %(default)s")
    add("--sheet", help="PNG of the shares over the seconds; default: beside --output, as .png")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lumos.compression.networks import network_of
    from lumos.compression.report import draw, seconds_in_turn, size_of, table
    from lumos.errors import UserError, printable, shown
    from lumos.evaluation.prompts import check_kinds, generate_in_batches, moved, prompt_set, score
    from lumos.files import check_outputs, folder_sha256, write_json
    from lumos.pipeline.base import VideoPipeline
    from lumos.progress import progress_bar
    from lumos.runtime import no_progress_bar, pick_device, versions

    least = {"count": MAX_CLIPS, "clips": MAX_CLIPS, "batch_size": MAX_BATCH, "repetitions": 1000}
    check_counts(args, seed=(0, MAX_SEED), **{name: (1, most) for name, most in least.items()})
    sheet, can_draw = args.sheet or str(Path(args.output).with_suffix(".png")), find_spec("matplotlib") is not None
    check_outputs([sheet], [args.output])
    if args.sheet and not can_draw:
        raise UserError("--sheet needs matplotlib; install it with pip install 'lumos-video[plot]', or leave it out")
    check_kinds(args.kinds)
    places = [Path(model).resolve() for model in args.models]
    if twice := [model for i, model in enumerate(args.models) if places[i] in places[:i]]:
        raise UserError(f"--models names {shown(twice[0])} twice; name it once")
    device = pick_device(args.device)
    networks = [network_of(model, "model") for model in args.models]
    with no_progress_bar():
        pipes = [VideoPipeline.from_pretrained(model, device=device) for model in args.models]
    shapes = {(pipe.clip.num_frames, pipe.clip.height, pipe.clip.width, pipe.clip.fps) for pipe in pipes}
    if len(shapes) > 1:
        raise UserError(f"the models make clips of {len(shapes)} shapes {sorted(shapes)}; compare models with clips of one shape")
    shape = {name: getattr(pipes[0].clip, name) for name in ("num_frames", "fps", "height", "width")}
    prompts = {kind: list(zip(*prompt_set(kind, args.count, args.seed, **shape), strict=True)) for kind in args.kinds}
    first_prompt = prompts[args.kinds[0]][0][0]

    losses = [losses_of(network, pipe, args.clips) for network, pipe in zip(networks, pipes, strict=True)]
    with progress_bar(total=len(pipes) * (args.repetitions + 1), desc="clips to measure") as bar:
        seconds = seconds_in_turn(pipes, first_prompt, args.repetitions, args.seed, bar.update)
    rows = []
    with progress_bar(total=len(pipes) * len(args.kinds) * args.count, desc="clips to judge") as bar:
        for model, pipe, of, on_held_out in zip(args.models, pipes, seconds, losses, strict=True):

            def make(texts: list[str], seeds: list[int], _: None, pipe: VideoPipeline = pipe) -> list:
                frames = pipe(texts, seed=seeds, output_type="uint8").frames
                bar.update(len(texts))
                return frames

            shares = {}
            for kind, (texts, truth, wanted) in prompts.items():
                clips = generate_in_batches(make, args.seed, args.batch_size, texts)
                shares[kind] = score(clips, wanted)[0] | {"moved": moved(clips, truth)}
            facts = {"sha256": folder_sha256(Path(model)), **size_of(model, pipe)}
            rows.append({"model": model, **facts, "seconds": of, "shares": shares, "losses": on_held_out})
    cells = table(rows, args.kinds)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        print(printable("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()))
    summary = {
        "compress": "report", "count": args.count, "seed": args.seed, **shape, "repetitions": args.repetitions,
        "device": str(device), "models": rows, "versions": versions(),
    }  # fmt: skip
    write_json(args.output, summary)
    print(printable(args.output))
    if can_draw:
        draw(rows, args.kinds, Path(sheet))
        print(printable(sheet))
    else:
        print("no picture: it needs matplotlib; pip install 'lumos-video[plot]'")
    return summary


def losses_of(network: GeneratorNetwork, pipe: VideoPipeline, clips: int) -> dict[str, Any]:
    """Return the mean loss on held-out clips with fixed draws, and that of each place of each group: loss, loss_by.

    Raises RunError if it is not finite.
    """
    from lumos.commands.scoring import clips_of
    from lumos.compression.importance import score
    from lumos.errors import RunError
    from lumos.settings import is_finite

    task, batches = clips_of(network, pipe.device, clips)
    found = score(task, pipe.model, batches, {}, ["loss"])
    if not is_finite(found["loss"]):
        raise RunError(f"the loss of {network.folder} is {found['loss']}, so its weights are damaged or too large; copy the model "
                       "again, or train it again")  # fmt: skip
    return {name: found[name] for name in ("loss", "loss_by")}
