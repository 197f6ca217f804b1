"""Benchmark of generation: a whole model from start to clip, and decoders against a baseline and a roofline.

The clip   A model at its default settings: the time to load it, the time to make a clip, the peak memory.
           All is measured in one new process. The peak is that of the whole process (on CUDA: of all
           memory that torch allocated).
Shapes     Only the decoder, from prefix ids to codes. The engine ("lumos") and the baseline ("published",
           `benchmarks.baseline`: the published method, written plainly by us, not the release itself)
           are timed in turn. The roofline ("bound" in JSON keys, `benchmarks.roofline`) is the time that
           the necessary FLOPs take at the speed of this machine's matrix products and attention. Memory
           is measured without the weights and with one step a frame, because the first step of a frame
           needs the most. A profile of the whole clip shows which operations take the time. Before
           anything is timed, the engine gets the ids that the baseline samples in at most two frames of
           two steps, and all visual logits must agree.
Options    Options that trade quality for time or memory, and other ways to run (`--later-steps`,
           `--options-dtype`, `--int8`, ...), make a third form, which is timed in turn with the other
           two. It has its own roofline. `--precisions` measures how far the logits with weights in
           bfloat16, float16 or int8 are from those of the baseline, for the same ids.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lumos.benchmarks.isolated import run_isolated
from lumos.benchmarks.measure import MB, TOLERANCE, Bench, Report, Step, extra_peak_bytes, interleaved, ratio, rounded, shown
from lumos.benchmarks.roofline import product_gflops, profiled
from lumos.device_peak import timed
from lumos.errors import RunError, UserError
from lumos.models.lumos1.benchmarks.arguments import FORMS, PLAIN, SHIPPED
from lumos.models.lumos1.benchmarks.decoding import SHAPES, DecodingCase, generate, generate_plainly, logits_difference, make_case
from lumos.models.lumos1.benchmarks.roofline import products
from lumos.models.lumos1.modeling import COMPILED
from lumos.models.lumos1.settings import GenerationSettings
from lumos.pipeline.acceleration import compile_parts, use_int8_weights
from lumos.pipeline.defaults import read_defaults, shipped_model
from lumos.pipeline.options import ACCELERATION, given_options
from lumos.runtime import parameter_count, peak_memory_bytes

LOGITS_TOLERANCE = 1e-3  # largest difference of two fp32 logits that count as equal
MAKERS = dict(zip(FORMS, (generate, generate_plainly), strict=True))
OPTIONS = "lumos_with_options"
TRADES = tuple(name for name, option in GenerationSettings.declared().items() if option.is_trade)


@dataclass(frozen=True)
class GenerationBenchmarkSettings:
    """The settings of the generation benchmark. Clips are made one at a time, with the seeds 0, 1, ...

    model       model folder
    shapes      names in `decoding.SHAPES`, or "shipped" for the model
    options     options of the third form, by name
    precisions  dtypes of weights whose logits are compared with the baseline
    memory      forms whose memory is measured
    """

    model: str
    prompt: str
    shapes: tuple[str, ...]
    options: dict[str, Any]
    precisions: tuple[str, ...]
    memory: tuple[str, ...] = FORMS


def settings_from(args: argparse.Namespace) -> GenerationBenchmarkSettings:
    model = Path(args.model) if args.model else shipped_model()
    if not (model / "config.json").is_file():
        raise UserError(f"there is no model in {model} (no config.json); name its folder with --model")
    if not args.prompt.strip():
        raise UserError("the prompt is empty; say in words what the clip shows")
    trades = given_options(args, TRADES)
    for shape in args.shapes:
        own = GenerationSettings(num_inference_steps=SHAPES[shape].steps) if shape != SHIPPED else None
        usual = own or read_defaults(model, GenerationSettings)[0]
        GenerationSettings(num_inference_steps=usual.num_inference_steps, **trades)
    options = trades | {name: True for name in ACCELERATION if getattr(args, name)}
    if args.options_dtype:
        options["dtype"] = args.options_dtype
    shapes, precisions, memory = (tuple(dict.fromkeys(names)) for names in (args.shapes, args.precisions, args.memory))
    return GenerationBenchmarkSettings(str(model), args.prompt, shapes, options, precisions, memory)


def steps(settings: GenerationBenchmarkSettings, bench: Bench) -> int:
    forms = len(FORMS) + bool(settings.options)
    return 1 + len(settings.shapes) * (len(settings.memory) + 1 + forms * bench.repetitions + 1 + len(settings.precisions))


def make_clips(model: str, prompt: str, clips: int, device: str, dtype: str) -> dict[str, Any]:
    """Load a model, make clips, and return the figures in seconds and bytes. Call it in a new process."""
    import transformers

    from lumos.models.lumos1.pipeline import LumosPipeline
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
    """Make the decoder and return a step, which makes one clip with one step a frame."""
    case = make_case(shape, folder, prompt, device, dtype).cut(steps=1)
    return lambda: MAKERS[form](case) or ()


def extra_memory(**arguments: Any) -> int:
    """Return the peak memory in bytes without weights and libraries, the cache included. Call it in a new process."""
    return extra_peak_bytes(prepare, arguments, {"shape": "small"})


def check_logits(case: DecodingCase, shape: str, dtype: str) -> float:
    """Return the largest difference of the logits of engine and baseline. Raises RunError if it is over the tolerance."""
    found = logits_difference(case.cut(frames=2, steps=2))
    allowed = LOGITS_TOLERANCE if dtype == "float32" else found.scale * TOLERANCE[getattr(torch, dtype)]
    if not found.largest <= allowed:
        difference = f"differ by {found.largest:.2g}; {allowed:.2g} is allowed"
        raise RunError(f"generation, shape {shape}: logits of engine and of the published method {difference}")
    return found.largest


def precision_difference(case: DecodingCase, precision: str) -> dict[str, float]:
    """Return the difference between the logits of the model in another precision and those of the baseline."""
    model = copy.deepcopy(case.model)
    if precision == "int8":
        use_int8_weights(model.model.layers)
    else:
        model.to(getattr(torch, precision))
    return {name: rounded(value) for name, value in asdict(logits_difference(case.cut(frames=2, steps=2), model)).items()}


def with_options(case: DecodingCase, options: dict[str, Any]) -> DecodingCase:
    """Return the case with the options of the third form. The model is copied if an option changes it."""
    trades, model = {name: value for name, value in options.items() if name in TRADES}, case.model
    if len(trades) < len(options):
        model = copy.deepcopy(model)
    if options.get("dtype"):
        model.to(getattr(torch, options["dtype"]))
    if options.get("int8"):
        use_int8_weights(model.model.layers)
    if options.get("compile"):
        compile_parts(model, COMPILED)
    return replace(case, model=model, settings=replace(case.settings, **trades))


def form_figures(case: DecodingCase, seconds: float, bench: Bench) -> dict[str, Any]:
    """Return the FLOPs that a case needs, its roofline in seconds, and the share of the roofline that `seconds` reaches.

    With a confidence threshold the number of steps is not known in advance, so there is no roofline.
    """
    figures = {**vars(case.settings), "cache_mb": rounded(case.cache_bytes / MB)}
    if case.settings.confidence_threshold is not None:
        return {**figures, "gflops_that_must_be_done": None, "products": None, "bound_seconds": None, "share_of_bound": None}
    parts = {p: product_gflops(p, bench.device, case.model.dtype) for p in products(case)}
    bound = sum(p.flops / gflops / 1e9 for p, gflops in parts.items())
    return {
        **figures, "gflops_that_must_be_done": rounded(sum(p.flops for p in parts) / 1e9),
        "products": {p.part: {"gflops": rounded(p.flops / 1e9), "peak_gflops": rounded(gflops)} for p, gflops in parts.items()},
        "bound_seconds": rounded(bound), "share_of_bound": rounded(bound / seconds),
    }  # fmt: skip


def run_shape(
    shape: str, settings: GenerationBenchmarkSettings, bench: Bench
) -> tuple[dict[str, Any], dict[str, Any], list[list[str]]]:
    """Measure one shape and return (figures, ratios, rows of the table)."""
    arguments = {"shape": shape, "folder": settings.model, "prompt": settings.prompt, **bench.place}
    megabytes = dict.fromkeys(FORMS)  # None: not measured
    for form in settings.memory:
        call = {"form": form, **arguments}
        extra = run_isolated(__name__, "extra_memory", call, threads=bench.threads, what=f"{form}, shape {shape}")
        megabytes[form] = rounded(extra / MB)
        bench.step()
    case = make_case(**arguments)
    difference = check_logits(case, shape, bench.dtype)
    bench.step()
    forms = {name: lambda form=form: form(case) or () for name, form in MAKERS.items()}
    if settings.options:
        changed = with_options(case, settings.options)
        forms[OPTIONS] = lambda: generate(changed) or ()
        if settings.options.get("compile"):
            generate(changed)  # the first run compiles and is not timed
    seconds, _ = interleaved(forms, bench, f"generation, shape {shape}")
    shares = profiled(lambda: generate(case), bench.device)
    bench.step()
    precisions = {}
    for precision in settings.precisions:
        precisions[precision] = precision_difference(case, precision)
        bench.step()
    config, figures = case.model.config, form_figures(case, seconds["lumos"], bench)
    row = {
        "shape": shape, "parameters": parameter_count(case.model), "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size, "visual_codes": config.visual_token_count, "tokens_a_frame": case.span,
        "latent_frames": case.frames, "logits_max_difference": rounded(difference),
        **{form: {"seconds": rounded(seconds[form]), "extra_memory_mb": megabytes[form]} for form in FORMS},
        **figures, "shares_of_time": {name: rounded(share, 3) for name, share in shares.items()},
        "precision_differences": precisions,
    }  # fmt: skip
    plain = seconds["published"]
    of = {
        "shape": shape, "published_over_lumos_time": ratio(plain, seconds["lumos"]),
        "published_over_lumos_memory": None if None in megabytes.values() else ratio(megabytes["published"], megabytes["lumos"]),
    }  # fmt: skip
    costliest = [name for name in shares if name not in ("products", "attention")]
    costliest = sorted(costliest, key=shares.get, reverse=True)[:3]
    table = [[
        shape, *shown_roofline(figures, seconds["lumos"]), shown(plain), shown(of["published_over_lumos_time"]),
        f"{difference:.1g}", shown(figures["cache_mb"]), *map(shown, megabytes.values()),
        ", ".join(f"{name} {shares[name]:.0%}" for name in costliest),
    ]]  # fmt: skip
    if settings.options:
        spent, figures = seconds[OPTIONS], form_figures(changed, seconds[OPTIONS], bench)
        row[OPTIONS] = {"seconds": rounded(spent), **settings.options, **figures}
        of[f"published_over_{OPTIONS}_time"] = ratio(plain, spent)
        table.append([
            f"{shape}, options", *shown_roofline(figures, spent), shown(plain), shown(ratio(plain, spent)), "-",
            shown(figures["cache_mb"]), "-", shown(megabytes["published"]), "",
        ])  # fmt: skip
    return row, of, table


def shown_roofline(figures: dict[str, Any], seconds: float) -> list[str]:
    share = figures["share_of_bound"]
    percent = "-" if share is None else f"{share:.0%}"
    return [shown(figures["gflops_that_must_be_done"]), shown(figures["bound_seconds"]), shown(seconds), percent]


def run(settings: GenerationBenchmarkSettings, bench: Bench) -> Report:
    call = {"model": settings.model, "prompt": settings.prompt, "clips": bench.repetitions, **bench.place}
    made = run_isolated(__name__, "make_clips", call, threads=bench.threads, what=f"generation with {settings.model}")
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
    headers = ["shape", "GFLOP", "roofline s", "Lumos s", "of roofline", f"{PLAIN}, s", "time x", "logits differ",
               "cache MB", "extra MB", f"{PLAIN}, MB", "overhead"]  # fmt: skip
    return Report(
        {**asdict(settings), "forms": {"published": PLAIN}, "generation": made["settings"]}, {**measured, "shapes": rows},
        {"clip_seconds_per_second_of_video": ratio(clip, video), "shapes": ratios}, [clips, [headers, *chain(*shapes)]],
    )  # fmt: skip
