"""A whole model from start to clip, and decoders of several shapes against a plain twin and against what the arithmetic allows.

The clip   A model at its own default settings: how long it takes to be ready, how long for a clip, how much memory at most. All
           in one fresh process that does nothing else; the peak is the whole process's (on CUDA: all that torch allocated).
Shapes     Only the decoder, from prefix ids to codes: seconds of the engine and of `twin`, in turn; the time that the FLOPs
           take at the speed of this machine's own matrix products (`bound`); memory beyond the weights, at one step a frame, for
           the first step of a frame needs the most; where the time goes, by a profile. Before anything is timed, the engine
           is fed what the twin makes of at most two frames of two steps, and all visual logits must agree.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lumos.benchmarks.apart import run_apart
from lumos.benchmarks.bound import product_gflops, products, profiled
from lumos.benchmarks.decoding import SHAPES, SHIPPED, Case, generate, generate_plainly, logits_difference, make_case
from lumos.benchmarks.measure import MB, TOLERANCE, Bench, Report, Step, extra_peak_bytes, interleaved, ratio, rounded, shown, timed
from lumos.commands.generate import shipped_model
from lumos.errors import RunError, UserError
from lumos.runtime import peak_memory_bytes

LOGITS_TOLERANCE = 1e-3  # largest difference of two fp32 logits that are called the same
FORMS = {"lumos": generate, "twin": generate_plainly}


@dataclass(frozen=True)
class Settings:
    """model: folder. Clips are made one at a time, with the seeds 0, 1, ... shapes: "shipped" is that model."""

    model: str
    prompt: str
    shapes: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="model folder; default: the shipped model")
    add("--prompt", default="a large red circle moves left on a gray background", help="default: %(default)s")
    add("--shapes", nargs="+", choices=(SHIPPED, *SHAPES), default=[SHIPPED], metavar="SHAPE",
        help=f"decoders to compare with a plain twin: {SHIPPED} (the model), or with random weights {', '.join(SHAPES)}; "
             "0.5b and mid take minutes; default: shipped")  # fmt: skip


def settings_from(args: argparse.Namespace) -> Settings:
    model = Path(args.model) if args.model else shipped_model()
    if not (model / "config.json").is_file():
        raise UserError(f"there is no model in {model} (no config.json); name its folder with --model")
    if not args.prompt.strip():
        raise UserError(f"the prompt is empty ({args.prompt!r}); say in words what the clip shows")
    return Settings(str(model), args.prompt, tuple(dict.fromkeys(args.shapes)))


def steps(settings: Settings, bench: Bench) -> int:
    return 1 + len(settings.shapes) * (1 + len(FORMS) * (1 + bench.repetitions) + 1)


def make_clips(model: str, prompt: str, clips: int, device: str, dtype: str) -> dict[str, Any]:
    """Load and generate; figures in seconds and bytes. Runs in a process of its own."""
    import transformers

    from lumos.pipeline import LumosPipeline
    from lumos.runtime import seconds_since_start

    transformers.utils.logging.disable_progress_bar()
    started = seconds_since_start()
    begin = time.perf_counter()
    pipe = LumosPipeline.from_pretrained(model, dtype=getattr(torch, dtype), device=device)
    loaded = time.perf_counter() - begin
    seconds = []
    for seed in range(clips):
        spent, result = timed(lambda seed=seed: pipe(prompt, seed=seed), device)
        seconds.append(spent)
    return {
        "start": started, "load": loaded, "clips": seconds, "peak": peak_memory_bytes(torch.device(device)),
        "frames": len(result.frames[0]), "settings": result.settings,
    }  # fmt: skip


def prepare(form: str, shape: str, folder: str, prompt: str, device: str, dtype: str) -> Step:
    """Make the decoder; the step makes one clip with one step a frame."""
    case = make_case(shape, folder, prompt, device, dtype).cut(steps=1)
    return lambda: FORMS[form](case) or ()


def extra_memory(**arguments: Any) -> int:
    """Bytes on top of weights and libraries, the cache included; runs in a process of its own."""
    return extra_peak_bytes(prepare, arguments, {"shape": "small"})


def check_logits(case: Case, shape: str, dtype: str) -> float:
    """The largest difference of engine and twin; RunError if it is too large to call them equal."""
    difference, largest = logits_difference(case.cut(frames=2, steps=2))
    allowed = LOGITS_TOLERANCE if dtype == "float32" else largest * TOLERANCE[getattr(torch, dtype)]
    if not difference <= allowed:
        raise RunError(f"generation, shape {shape}: logits of engine and twin differ by {difference:.2g}; {allowed:.2g} is allowed")
    return difference


def run_shape(shape: str, settings: Settings, bench: Bench) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(figures, ratios, row of the table) of one shape."""
    arguments = {"shape": shape, "folder": settings.model, "prompt": settings.prompt, **bench.place}
    memory = {}
    for form in FORMS:
        call = {"form": form, **arguments}
        memory[form] = run_apart("generate", "extra_memory", call, threads=bench.threads, what=f"{form}, shape {shape}")
        bench.step()
    case = make_case(**arguments)
    difference = check_logits(case, shape, bench.dtype)
    bench.step()
    forms = {name: lambda form=form: form(case) or () for name, form in FORMS.items()}
    seconds, _ = interleaved(forms, bench, f"generation, shape {shape}")
    shares = profiled(lambda: generate(case.cut(frames=2, steps=4)), bench.device)
    bench.step()
    parts = {p: product_gflops(p, bench.device, getattr(torch, bench.dtype)) for p in products(case)}
    flops, bound = sum(p.flops for p in parts), sum(p.flops / gflops / 1e9 for p, gflops in parts.items())
    config = case.model.config
    row = {
        "shape": shape, "parameters": sum(p.numel() for p in case.model.parameters()), "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size, "visual_codes": config.visual_token_count, "tokens_a_frame": case.span,
        "latent_frames": case.frames, **vars(case.settings), "logits_max_difference": rounded(difference),
        **{form: {"seconds": rounded(seconds[form]), "extra_memory_mb": rounded(memory[form] / MB)} for form in FORMS},
        "cache_mb": rounded(case.cache_bytes / MB), "gflops_that_must_be_done": rounded(flops / 1e9),
        "products": {
            p.part: {"gflops": rounded(p.flops / 1e9), "peak_gflops": rounded(gflops)} for p, gflops in parts.items()
        },
        "bound_seconds": rounded(bound), "share_of_bound": rounded(bound / seconds["lumos"]),
        "shares_of_time": {name: rounded(share, 3) for name, share in shares.items()},
    }  # fmt: skip
    of = {
        "shape": shape, "twin_over_lumos_time": ratio(seconds["twin"], seconds["lumos"]),
        "twin_over_lumos_memory": ratio(memory["twin"], memory["lumos"]),
    }  # fmt: skip
    costliest = [name for name in shares if name not in ("products", "attention")]
    costliest = sorted(costliest, key=shares.get, reverse=True)[:3]
    table = [
        shape, shown(flops / 1e9), shown(bound), shown(seconds["lumos"]), f"{bound / seconds['lumos']:.0%}",
        shown(seconds["twin"]), shown(of["twin_over_lumos_time"]), f"{difference:.1g}", shown(case.cache_bytes / MB),
        shown(memory["lumos"] / MB), shown(memory["twin"] / MB), ", ".join(f"{name} {shares[name]:.0%}" for name in costliest),
    ]  # fmt: skip
    return row, of, table


def run(settings: Settings, bench: Bench) -> Report:
    call = {"model": settings.model, "prompt": settings.prompt, "clips": bench.repetitions, **bench.place}
    made = run_apart("generate", "make_clips", call, threads=bench.threads, what=f"generation with {settings.model}")
    bench.step()
    clip = statistics.median(made["clips"])
    video = made["frames"] / made["settings"]["fps"]
    measured = {
        "start_seconds": rounded(made["start"]), "load_seconds": rounded(made["load"]),
        "first_clip_seconds": rounded(made["clips"][0]), "clip_seconds": rounded(clip),
        "all_clip_seconds": [rounded(s) for s in made["clips"]], "frames": made["frames"],
        "peak_memory_mb": rounded(made["peak"] / MB),
    }  # fmt: skip
    clips = [
        ["start s", "load s", "first clip s", "clip s", "frames", "peak MB"],
        [shown(made["start"]), shown(made["load"]), shown(made["clips"][0]), shown(clip), str(made["frames"]),
         shown(made["peak"] / MB)],
    ]  # fmt: skip
    rows, ratios, shapes = zip(*(run_shape(shape, settings, bench) for shape in settings.shapes), strict=True)
    headers = ["shape", "GFLOP", "bound s", "Lumos s", "of bound", "twin s", "time x", "logits differ", "cache MB",
               "extra MB", "twin MB", "overhead"]  # fmt: skip
    return Report(
        {**asdict(settings), "generation": made["settings"]}, {**measured, "shapes": rows},
        {"clip_seconds_per_second_of_video": ratio(clip, video), "shapes": ratios}, [clips, [headers, *shapes]],
    )  # fmt: skip
