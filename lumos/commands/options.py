"""The flags for how a pipeline is loaded and how clips are drawn, the same for every verb."""

from __future__ import annotations

import argparse

TRADES = ("guidance_interval", "confidence_threshold", "later_steps", "history_frames", "history_thinning")
"""Fields of GenerationSettings that save time or memory and change what is made."""
SAMPLING = (
    "num_inference_steps", "guidance_scale", "temperature", "top_k", "top_p", "history_mask_ratio", "mask_given_frames", *TRADES,
)  # fmt: skip
"""All fields of GenerationSettings."""
ACCELERATION = ("int8", "compile")
PLACES = ("video_tokenizer", "text_tokenizer", "lora")
LOADING = (*PLACES, "device", *ACCELERATION, "device_map")
"""Arguments of LumosPipeline.from_pretrained that a flag gives as they are."""


def add_sampling(parser: argparse.ArgumentParser, pictures: bool = False, given: bool = True) -> None:
    """pictures: without flags that only clips know; given: clips may begin with given frames."""
    add = parser.add_argument
    add("--num-inference-steps", type=int, help="parallel decoding steps of each latent frame")
    add("--guidance-scale", type=float, help="1 = no guidance")
    add("--temperature", type=float, help="noise on the confidence, annealed to 0 within each frame")
    add("--top-k", type=int, help="sample among the k likeliest codes")
    add("--top-p", type=float, help="sample among the likeliest codes of this total probability")
    if not pictures:
        add("--history-mask-ratio", type=float, help="share of each finished frame hidden from later frames")
    if given:
        add("--mask-given-frames", action=argparse.BooleanOptionalAction, default=None, help="hide that share of given frames too")
    add_trades(parser, pictures)


def add_trades(parser: argparse.ArgumentParser, pictures: bool = False) -> None:
    add = parser.add_argument
    add("--guidance-interval", type=float, nargs=2, metavar=("START", "STOP"),
        help="guidance only in this part of each frame's steps: 0 0.5 is the first half")  # fmt: skip
    add("--confidence-threshold", type=float, help="a step also decides every code that is at least so probable")
    if not pictures:
        add("--later-steps", type=int, help="steps of each latent frame after the first")
        add("--history-frames", type=int, help="a frame sees the first latent frame and so many before it; memory stays bounded")
        add("--history-thinning", action=argparse.BooleanOptionalAction, default=None,
            help="those are the newest and older ones, the farther apart the older, over the whole clip")  # fmt: skip


def add_parts(parser: argparse.ArgumentParser) -> None:
    """Where the tokenizers lie."""
    add = parser.add_argument
    add("--video-tokenizer", help="folder of the video tokenizer; default: in the model folder")
    add("--text-tokenizer", help="file or folder of the text tokenizer; default: in the model folder")


def add_device(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on CUDA, float32 on CPU")


def add_acceleration(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--int8", action="store_true", help="the decoder's linear layers with int8 weights: a quarter of the memory (extra [int8])")
    add("--compile", action="store_true", help="torch.compile for norms and MLPs; the first clip waits for the compiler")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Everything that says how a pipeline is loaded, but its model."""
    add = parser.add_argument
    add("--lora", help="adapter folder that a run with lora.rank exported; merged into the model")
    add_parts(parser)
    add_device(parser)
    add_acceleration(parser)
    add("--device-map", choices=("auto",), help="layers that do not fit on the device wait in host memory or in their files")
    add("--max-memory", nargs="+", metavar="PLACE=SIZE", help="most that weights take with --device-map: 0=6GiB cpu=16GiB")
