"""`generate`: a clip or a picture from words, from a picture, or continuing a clip."""

from __future__ import annotations

import argparse
import re
import sys
import time
from datetime import datetime
from pathlib import Path

from lumos.commands.sampling import TRADES, add_acceleration, add_trades

SHIPPED_MODEL = "checkpoints/lumos-tiny"
BAR = "{l_bar}{bar}| frame {n:.1f}/{total} [{elapsed}<{remaining}{postfix}]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompt", required=True, help="what the clip shows")
    add("--negative-prompt", help="what guidance leads away from; default: no text at all")
    add("--image", help="picture that the clip begins with")
    add("--video", help="clip that the result continues; its last frames are kept")
    add("--num-given-frames", type=int, help="frames of --video to keep, 1 + a multiple of 4; default: up to half of the result")
    add("--model", default=None, help=f"model folder; default: {SHIPPED_MODEL}")
    add("--lora", help="adapter folder that a run with lora.rank exported; merged into the model")
    add("--video-tokenizer", help="folder of the video tokenizer; default: in the model folder")
    add("--text-tokenizer", help="file or folder of the text tokenizer; default: in the model folder")
    add("--output", help="file to write: .mp4 .gif .webp .png; default: outputs/<prompt>-<seed>.mp4")
    add("--num-frames", type=int, help="1 + a multiple of 4, given frames included; 1 makes a picture")
    add("--height", type=int, help="pixels")
    add("--width", type=int, help="pixels")
    add("--fps", type=int, help="frames per second")
    add("--num-inference-steps", type=int, help="parallel decoding steps of each latent frame")
    add("--guidance-scale", type=float, help="1 = no guidance")
    add("--temperature", type=float, help="noise on the confidence, annealed to 0 within each frame")
    add("--top-k", type=int, help="sample among the k likeliest codes")
    add("--top-p", type=float, help="sample among the likeliest codes of this total probability")
    add("--history-mask-ratio", type=float, help="share of each finished frame hidden from later frames")
    add("--mask-given-frames", action=argparse.BooleanOptionalAction, default=None, help="hide that share of given frames too")
    add_trades(parser)
    add("--seed", type=int, help="default: drawn, printed and stored")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on CUDA, float32 on CPU")
    add_acceleration(parser)
    add("--device-map", choices=("auto",), help="layers that do not fit on the device wait in host memory or in their files")
    add("--max-memory", nargs="+", metavar="PLACE=SIZE", help="most that weights take with --device-map: 0=6GiB cpu=16GiB")


def run(args: argparse.Namespace) -> None:
    from lumos.files import check_writable, write_json
    from lumos.pipeline_inputs import align, check_prompt
    from lumos.video_io import check_output

    check_prompt(args.prompt)
    seed = align(args.prompt, seed=args.seed)["seed"][0]
    output = Path(args.output or default_output(args.prompt, seed, args.num_frames))
    check_output(output, args.num_frames)
    check_writable(record_path(output))

    import torch
    import transformers
    from tqdm import tqdm

    from lumos import __version__
    from lumos.pipeline import LumosPipeline
    from lumos.placement import parse_max_memory
    from lumos.runtime import peak_memory_bytes, seconds_since_start, versions
    from lumos.video_io import write_video

    transformers.utils.logging.disable_progress_bar()
    model = args.model or shipped_model()
    pipe = LumosPipeline.from_pretrained(
        model, video_tokenizer=args.video_tokenizer, text_tokenizer=args.text_tokenizer, lora=args.lora,
        dtype=args.dtype and getattr(torch, args.dtype), device=args.device, int8=args.int8, compile=args.compile,
        device_map=args.device_map, max_memory=parse_max_memory(args.max_memory),
    )  # fmt: skip
    num_frames = args.num_frames or pipe.clip.num_frames
    check_output(output, num_frames, 1 if num_frames == 1 else args.fps or pipe.clip.fps)
    loaded, start_seconds = time.perf_counter(), seconds_since_start()
    with tqdm(unit="frame", desc="generating", bar_format=BAR, file=sys.stderr, leave=False) as bar:

        def on_step(frame: int, frames: int, step: int, steps: int) -> None:
            bar.total = frames
            bar.set_postfix_str(f"step {step + 1}/{steps}", refresh=False)
            bar.update(frame + (step + 1) / steps - bar.n)

        result = pipe(
            args.prompt, negative_prompt=args.negative_prompt, image=args.image, video=args.video,
            num_given_frames=args.num_given_frames, num_frames=args.num_frames, height=args.height, width=args.width,
            fps=args.fps, num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale,
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            history_mask_ratio=args.history_mask_ratio, mask_given_frames=args.mask_given_frames, seed=seed,
            output_type="uint8", on_step=on_step, **{name: getattr(args, name) for name in TRADES},
        )  # fmt: skip
    generated = time.perf_counter()
    metadata = {"prompt": args.prompt, "seed": seed, "model": str(model), "lora": args.lora, "lumos": __version__}
    written = write_video(output, result.frames[0], result.settings["fps"], metadata)
    memory = round(peak_memory_bytes(pipe.model.device) / 2**20)
    total = seconds_since_start()
    write_json(
        record_path(written),
        {
            **metadata, "output": str(written), "negative_prompt": args.negative_prompt, "image": args.image,
            "video": args.video,
            "video_tokenizer": args.video_tokenizer, "text_tokenizer": args.text_tokenizer, "settings": result.settings,
            "dtype": str(pipe.model.dtype).removeprefix("torch."), "device": str(pipe.model.device),
            "int8": args.int8, "compile": args.compile, "device_map": args.device_map, "max_memory": args.max_memory,
            "created": datetime.now().astimezone().isoformat(timespec="seconds"),
            "seconds": {"start_and_load": round(start_seconds, 2), "generate": round(generated - loaded, 2),
                        "total": round(total, 2)},
            "peak_memory_mb": memory,
            "versions": versions(),
        },
    )  # fmt: skip
    print(f"{written}  seed {seed}  {total:.1f} s  peak memory {memory} MB")


def record_path(result: Path) -> Path:
    """Where the settings of a result lie: out.mp4 -> out.mp4.json."""
    return result.with_name(f"{result.name}.json")


def shipped_model() -> Path:
    """The model in the repository, from its root or from anywhere when installed in place."""
    here = Path(SHIPPED_MODEL)
    return here if here.is_dir() else Path(__file__).parents[2] / SHIPPED_MODEL


def default_output(prompt: str, seed: int, num_frames: int | None) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "clip"
    return f"outputs/{name}-{seed}{'.png' if num_frames == 1 else '.mp4'}"
