"""Random pictures with the statistics of photographs: noise with a falling spectrum, under "dead leaves".

Few photographs may be distributed with the code, too few to train a video tokenizer. Random textures make up for that
(Baradad et al. 2021, Learning to See by Looking at Noise, arXiv 2106.05963).
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 160
"""Height and width of a texture in pixels."""


def texture(rng: np.random.Generator) -> Image.Image:
    """Return a picture RGB of SIDE x SIDE: noise, or overlapping discs and polygons in the colours of noise, blended with it."""
    noise = spectral_noise(rng, SIDE)
    if rng.random() < 0.3:
        return Image.fromarray(noise)
    leaves = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 4))))
    draw = ImageDraw.Draw(leaves)
    palette = noise.reshape(-1, 3)
    for _ in range(int(rng.integers(20, 120))):
        radius = 4 / rng.uniform(0.04, 1)  # radii follow a power law: many small ones, few large ones
        centre = rng.uniform(-10, SIDE + 10, 2)
        colour = tuple(map(int, palette[rng.integers(len(palette))]))
        if rng.random() < 0.5:
            ratio = rng.uniform(0.3, 1)
            half = radius * np.array([1, ratio] if rng.random() < 0.5 else [ratio, 1])
            draw.ellipse((*(centre - half), *(centre + half)), fill=colour)
        else:
            angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
            corners = centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            draw.polygon([tuple(corner) for corner in corners], fill=colour)
    return Image.blend(leaves, Image.fromarray(noise), float(rng.uniform(0, 0.5)))


def spectral_noise(rng: np.random.Generator, side: int) -> np.ndarray:
    """Return noise uint8 [side, side, 3] with correlated channels.

    Amplitudes fall with the 1st to 2nd power of the frequency, as in photographs.
    """
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1 / side
    spectrum = frequency ** -rng.uniform(1, 2)
    waves = np.fft.rfft2(rng.standard_normal((3, side, side), dtype=np.float32)) * spectrum
    fields = np.fft.irfft2(waves, s=(side, side)).reshape(3, -1)
    fields = (fields - fields.mean(1, keepdims=True)) / fields.std(1, keepdims=True)
    mixing = np.eye(3) * rng.uniform(0.05, 0.6) + 1 / 3  # gray and some colour
    fields = mixing @ fields
    contrast, brightness = rng.uniform(20, 75), rng.uniform(60, 195, (3, 1))
    pixels = brightness + contrast * fields / fields.std()
    return pixels.clip(0, 255).astype(np.uint8).reshape(3, side, side).transpose(1, 2, 0)


def recoloured(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the clip, uint8 [T, H, W, 3], in half of the cases with other colours.

    Each channel has a random gain and gamma, and sometimes the channels are permuted.
    """
    if rng.random() < 0.5:
        return clip
    values = np.arange(256)[:, None] / 255
    table = 255 * np.clip(rng.uniform(0.7, 1.2, 3) * values ** rng.uniform(0.7, 1.4, 3), 0, 1)
    channels = rng.permutation(3) if rng.random() < 0.3 else range(3)
    table = table.astype(np.uint8)
    return np.stack([table[:, c][clip[..., channels[c]]] for c in range(3)], axis=-1)
