"""Words for the figures of experiments, in pictures and tables."""

from __future__ import annotations

WORDS = {
    "all": "prompts followed", "background": "background right", "clip_gflops": "GFLOPs a clip",
    "clip_seconds": "CPU seconds a clip", "colour": "color right", "colour_and_motion": "color and motion right",
    "count": "number right", "first_frame": "given frame kept", "frechet": "Fréchet distance", "given_frames": "given frames kept",
    "last_frame": "last frame right", "memory_mb": "peak memory, MB", "motion": "motion right", "moved": "motion, over the truth's",
    "moving": "clips that move", "psnr": "PSNR of made frames, dB", "shape": "shape right", "size": "size right",
    "sprite": "picture right", "steady": "object kept",
}  # fmt: skip
KINDS = {
    "one": "one shape", "two": "two shapes", "two_ways": "two shapes, two ways", "digits": "a digit", "sprites": "a sprite",
    "two_sprites": "two sprites", "held_out": "never shown",
    "held_out_sprites": "sprites never shown", "paraphrased": "other words",
}  # fmt: skip


def in_words(figure: str, names: dict[str, str]) -> str:
    """Return a figure or curve in words: those of an experiment, `names`, or the usual ones; `all of two` has words for both."""
    if figure in names:
        return names[figure]
    name, of, kind = figure.partition(" of ")
    return WORDS.get(name, name) + (f", {KINDS.get(kind, kind)}" if of else "")
