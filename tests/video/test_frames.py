from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from lumos.errors import UserError
from lumos.video import frames
from lumos.video.frames import animated_sheet, contact_sheet, fit
from lumos.video.io import read_image


def test_contact_sheet(tmp_path):
    red, blue = (np.full((9, 32, 32, 3), c, np.uint8) for c in ([200, 0, 0], [0, 0, 200]))
    clips = [red, blue, red[:1]]
    path = contact_sheet(clips, ["a red one", "a blue one " * 40, ""], tmp_path / "s.png", columns=4, cell=40, across=2)
    sheet = read_image(path)
    half = sheet.shape[1] // 2
    above, below = sheet[:17], sheet[17:36]  # the long label takes two lines, the short one is close above its frames
    assert not (above[:, :half] < 128).any()
    assert all((line < 128).any() for line in (below[:, :half], above[:, half:], below[:, half:]))
    for colour, strips in (([200, 0, 0], 5), ([0, 0, 200], 4)):  # red: four frames and the single one below
        assert (sheet == colour).all(axis=-1).sum() == strips * 40 * 40
    with pytest.raises(UserError):
        contact_sheet(clips, ["too few"], tmp_path / "s.png")


def test_a_long_label_is_measured_few_times(monkeypatch):
    """As much of it stays as fits; a measurement of a long text takes milliseconds."""
    measured, font, label = [], ImageFont.load_default(13), "noise number nine " * 500
    length = ImageFont.FreeTypeFont.getlength
    monkeypatch.setattr(ImageFont.FreeTypeFont, "getlength", lambda *args: measured.append(args) or length(*args))
    for width in (0, 40, 300, 599):
        cut = frames._shortened(label, font, width).removesuffix("...")
        assert label.startswith(cut)
        assert cut == "" or length(font, f"{cut}...") <= width
        assert length(font, f"{label[: len(cut) + 1]}...") > width
    assert len(measured) < 100


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_animated_sheet(tmp_path, suffix):
    """Two clips of 5 and 3 frames that brighten; the shorter one repeats its last frame."""
    long, short = (np.stack([np.full((16, 16, 3), 40 * t, np.uint8) for t in range(n)]) for n in (5, 3))
    path = animated_sheet([long, short], ["one", "two " * 40], tmp_path / f"a{suffix}", 8, cell=32, across=2)
    with Image.open(path) as opened:
        assert opened.n_frames == 5
        shown = []
        for t in range(5):
            opened.seek(t)
            page = np.asarray(opened.convert("RGB")).astype(int)
            shown.append((page[22, 22, 0], page[22, 60, 0]))
            assert (page[38:, 44:] < 128).any()
    for t, (first, second) in enumerate(shown):
        assert abs(first - 40 * t) < 6
        assert abs(second - 40 * min(t, 2)) < 6


def test_invalid_sheets_are_refused(tmp_path):
    clip = np.zeros((1, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match="as many labels as clips"):
        animated_sheet([clip], [], tmp_path / "a.webp", 8)
    with pytest.raises(UserError, match=r"\.webp or \.gif"):
        animated_sheet([clip], ["x"], tmp_path / "a.mp4", 8)


@pytest.mark.parametrize("shape", [(1, 60_000, 1, 3), (1, 1, 60_000, 3)])
def test_thin_pictures_are_refused_before_they_take_memory(shape):
    with pytest.raises(UserError, match=r"too thin for 128x128 pixels: .* crop it first"):
        fit(np.zeros(shape, np.uint8), 128, 128)
    assert fit(np.zeros((1, 600, 1, 3), np.uint8), 128, 128).shape == (1, 128, 128, 3)
