"""`plan`: estimate what a training run or, with --generate, a clip will need.

The estimate is pure arithmetic: it loads no weights and no data.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from lumos.cli import add_json
from lumos.commands.counts import check_counts
from lumos.commands.loading import add_device
from lumos.errors import printable
from lumos.pipeline.options import add_flags, all_options, given_options

UTILISATION = 0.4
MAX_GPUS = 10**6
OF_TRAINING = ("config", "overrides", "gpus", "gpu", "gpu_memory")
OF_CLIPS = ("model", "preset", "height", "width", "num_frames", "device", "dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", help="YAML file of the training, or the name of a recipe, for example lumos1/3b-stage2")
    add("overrides", nargs="*", metavar="section.key=value", help="overrides as in `train`, for example training.batch_size=96")
    add("--gpus", type=int, help="number of GPUs, or of processes with training.device=cpu; default: 1")
    add("--gpu", help="name of the GPU; default: h100")
    add("--gpu-memory", type=float, help="memory of one GPU in GiB; default: that of --gpu")
    add("--peak-tflops", type=float, help="peak TFLOP/s of one GPU; default: logging.peak_tflops, else the bf16 peak of --gpu")
    add("--utilisation", type=float, default=UTILISATION, help="assumed share of the peak that a run reaches; default: %(default)s")
    add("--text-tokens", type=int, help="tokens of a prompt; default: 16 for synthetic scenes, else 160")
    add("--generate", action="store_true", help="plan a clip in place of a training, with the options that follow")
    add("--model", help="model folder (only its config.json is read); default: the shipped one")
    add("--preset", help="model shape in place of a folder: NAME or GENERATOR-NAME; an unknown name lists the known ones")
    add("--height", type=int, help="pixels; the default of this option and all that follow is the model's own")
    add("--width", type=int, help="pixels")
    add("--num-frames", type=int, help="frames of the clip; 1 makes a picture; Lumos-1 makes 1 + a multiple of 4")
    add_flags(parser, costly_options())
    add_device(parser)
    add_json(parser)


def costly_options() -> dict[str, Any]:
    """Return the sampling options that affect the cost of a clip."""
    return {name: option for name, option in all_options().items() if option.affects_cost}


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lumos.errors import UserError

    if not 0 < args.utilisation <= 1:
        raise UserError(f"--utilisation {args.utilisation} is not allowed; give more than 0, at most 1")
    check_counts(args, text_tokens=(0, 2**20), gpus=(1, MAX_GPUS))
    mode, other = ("--generate", OF_TRAINING) if args.generate else ("a training", (*OF_CLIPS, *costly_options()))
    if given := [name for name in other if getattr(args, name) not in (None, [])]:
        option = args.overrides[0] if given[0] == "overrides" else f"--{given[0].replace('_', '-')}"
        raise UserError(f"{option} has no effect on the plan of {mode}; leave it out, or say which of both is meant")
    for name in ("gpu_memory", "peak_tflops"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value} is not allowed; give more than 0")
    report, text = generation(args) if args.generate else training(args)
    print("\n".join(map(printable, text.split("\n"))))
    return report


def training(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from lumos import registry
    from lumos.errors import UserError
    from lumos.planning.training import TrainingPlan
    from lumos.training.settings import load_settings

    if args.config is None:
        raise UserError("give --config of a training, for example --config lumos1/3b-stage2 --gpus 48, or --generate for a clip")
    args.gpus = args.gpus or 1
    settings = load_settings(args.config, args.overrides)
    cost = registry.generator(settings.generator).load("cost", "training").training_cost
    plan = TrainingPlan(settings, cost, hardware(args, settings), utilisation=args.utilisation, text_tokens=args.text_tokens)
    report = plan.report()
    return report, render(report)


def generation(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from pathlib import Path

    import torch

    from lumos import registry
    from lumos.device_peak import peak_flops
    from lumos.errors import UserError
    from lumos.pipeline.defaults import shipped_model
    from lumos.pipeline.hub import is_repository, local_folder
    from lumos.pipeline.inputs import override
    from lumos.runtime import pick_device

    if args.model is not None and args.preset is not None:
        raise UserError(f"--model {args.model} and --preset {args.preset} are both given; give one of them")
    folder, preset = None, None
    if args.preset is None:
        folder = shipped_model() if args.model is None else args.model
        folder = local_folder(folder) if is_repository(folder) else folder
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"{folder} is no model folder: it has no config.json; give one, or a --preset")
        generator = registry.generator_of(folder)
    else:
        generator, preset = registry.find_preset(args.preset)
    cost = generator.load("cost", "clip")
    config, settings, clip = cost.model_of(folder, preset)
    clip = override(clip, num_frames=args.num_frames, height=args.height, width=args.width)
    settings = settings.changed(**given_options(args, all_options()))
    device = pick_device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    text_tokens = (16 if config.max_prompt_tokens < 512 else 160) if args.text_tokens is None else args.text_tokens
    plan = cost.clip_cost(config, clip, settings, text_tokens, dtype)
    plan.warn_of_effects(given_options(args, all_options()))
    peak, known = peak_flops(device, dtype, args.peak_tflops)
    report = {"model": args.preset or str(folder), **plan.report(peak, args.utilisation), "peak_from": known}
    report |= {"settings": vars(settings), "text_tokens": text_tokens, "device": str(device), "dtype": str(dtype)[6:]}
    return report, render_clip(report)


def hardware(args: argparse.Namespace, settings: Any) -> Any:
    """Return the `lumos.planning.gpus.Hardware` that options and settings describe."""
    import psutil
    import torch

    from lumos.device_peak import peak_flops
    from lumos.errors import UserError, instead
    from lumos.planning.gpus import GIB, GPUS, Hardware
    from lumos.training.engine import pick_precision

    peak = args.peak_tflops or settings.logging.peak_tflops
    if settings.training.device == "cpu":
        if args.gpu:
            raise UserError(f"--gpu {args.gpu} has no effect with training.device=cpu; leave one of them out")
        memory = args.gpu_memory * GIB if args.gpu_memory else psutil.virtual_memory().total / args.gpus
        cpu = torch.device("cpu")
        # The peak is measured by one process on all cores, which the processes of the run will share.
        speed = peak * 1e12 if peak else peak_flops(cpu, pick_precision(settings.training.precision, cpu), None)[0] / args.gpus
        return Hardware("CPU process", args.gpus, int(memory), speed)
    name = (args.gpu or "h100").lower()
    if name not in GPUS:
        raise UserError(f"--gpu {args.gpu} is unknown{instead(name, GPUS)}, or give --gpu-memory and --peak-tflops")
    if args.gpu and args.gpu_memory and peak:
        raise UserError(f"--gpu {args.gpu} has no effect with both its memory and its peak given; leave it out")
    memory, known = GPUS[name]
    if settings.training.precision == "fp32" and not peak:
        raise UserError("training.precision is fp32, but peaks of GPUs are known in bf16; give --peak-tflops")
    label = "GPU" if args.gpu_memory and peak else name
    return Hardware(label, args.gpus, int((args.gpu_memory or memory) * GIB), (peak or known) * 1e12)


def render(report: dict[str, Any]) -> str:
    """Return the plan of a training as text."""
    from lumos.benchmarks.measure import render_table
    from lumos.planning.gpus import GIB
    from lumos.planning.sharding import PARTS

    machine, total = report["hardware"], report["total"]
    trained = "" if report["trained"] == report["parameters"] else f", of which {report['trained']:,} are trained"
    lines = [
        f"{report['name']}: {report['parameters']:,} parameters{trained}",
        f"{machine['count']} x {machine['name']}, {machine['memory'] / GIB:.0f} GiB and "
        f"{machine['peak'] / 1e12:,.4g} TFLOP/s each; a run is taken to get {report['utilisation']:.0%} of that (--utilisation)",
        "",
    ]
    rows = [["steps", "", "clips", "a process", "tokens a clip", "tokens a step", "FLOPs a step", "seconds", "GB sent"]]
    for kind in report["steps"]:
        parts = f"{kind['micro_batches']} x {kind['micro_batch']}"
        rows.append(
            [kind["kind"], f"{kind['steps']:,}", f"{kind['clips']:,.4g}", parts, f"{kind['tokens_of_a_clip']:,}",
             f"{kind['tokens']:,.0f}", f"{kind['flops']:.3g}", f"{kind['seconds']:.3g}",
             f"{kind['sent'] / 1e9:.3g}"]
        )  # fmt: skip
    rows.append(["all", f"{total['steps']:,}", "", "", "", f"{total['tokens']:.3g}", f"{total['flops']:.3g}",
                 f"{total['seconds']:.3g}", ""])  # fmt: skip
    again = sum(kind["flops_computed_again"] * kind["steps"] for kind in report["steps"]) / total["flops"]
    lines += [render_table(rows), "", f"{duration(total['seconds'])}, {total['seconds'] / 3600 * machine['count']:,.4g} GPU hours"]
    if sent := max(kind["sent"] / kind["seconds"] for kind in report["steps"]):
        lines[-1] += f", if each sends {sent / 1e9:,.3g} GB/s meanwhile"
    if again:
        lines[-1] += f"; activation checkpointing computes {again:.0%} more, not counted"
    rows = [["GiB of each", *PARTS, "a step", "start", "", "host"]]
    for way in report["memory"]:
        name = way["name"] + (" *" if way["configured"] else "")
        figures = [f"{size / GIB:.2f}" for size in (*way["parts"].values(), way["step"], way["start"])]
        rows.append([name, *figures, "fits" if way["fits"] else "too much", f"{way['host'] / GIB:.2f}"])
    room = (machine["memory"] - report["reserved"]) / GIB
    lines += ["", render_table(rows)]
    lines.append("Parts are at their largest, not all at once: a step needs less than their sum. Start: weights not yet divided.")
    lines += [f"* as these settings have it; {room:.4g} GiB may be used, the rest is for libraries and gaps between tensors"]
    lines += ["", report["advice"]]
    lines += [f"Assumed: {said}." for said in report["assumed"]]
    return "\n".join(lines)


def render_clip(report: dict[str, Any]) -> str:
    """Return the plan of a clip as text."""
    clip, flops, sizes, settings = (report[name] for name in ("clip", "flops", "bytes", "settings"))
    parts = ", ".join(f"{name} {flops[name] / flops['total']:.1%}" for name in flops if name != "total")
    held = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in sizes.items())
    guidance = f" at guidance {settings['guidance_scale']:g}" if "guidance_scale" in settings else ""  # not all generators have it
    return "\n".join((
        f"{report['model']}: {report['parameters']:,} parameters, {report['dtype']} on {report['device']}",
        f"clip     {clip['num_frames']} frames of {clip['width']}x{clip['height']} pixels: {report['latent_frames']} latent frames "
        f"of {report['codes_of_a_frame']:,} codes, a prompt of {report['text_tokens']} tokens",
        f"tokens   {report['tokens']:,} in a row; {report['rows']} row{'s' * (report['rows'] > 1)}{guidance}; "
        f"{'at most ' * report['may_end_early']}{report['steps']:,} steps",
        f"FLOPs    {flops['total']:.3g}: {parts}",
        f"memory   MiB: {held}",
        f"time     {duration(report['seconds'])} at {report['utilisation']:.0%} (--utilisation) of "
        f"{report['peak'] / 1e12:.3g} TFLOP/s, {report['peak_from']}",
        "Without loading and without decoding to pixels.",
    ))  # fmt: skip


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"
