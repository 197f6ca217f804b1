"""The pictures and films of a folder, for uses without captions: by the same rules as an ingest, by content and not by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lumos.data.ingest.item import BAD_CAPTION, LONG_CAPTION
from lumos.data.ingest.manifest import folder_items
from lumos.errors import UserError
from lumos.video.reading import can_read, is_still


@dataclass
class Media:
    """The media files of a folder and its subfolders in order, and why others cannot be read."""

    pictures: list[Path] = field(default_factory=list)
    films: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def media_of(folder: Path) -> Media:
    """Return the media files of a folder. Hidden files are none, and no folder behind links is read twice."""
    found = Media()
    for item in folder_items(folder, folder.name):
        path = Path(item.path)
        if item.problem and item.problem[0] not in (BAD_CAPTION, LONG_CAPTION):
            found.problems.append(item.problem[1])
            continue
        try:
            if is_still(path):
                found.pictures.append(path)
            elif can_read(path):
                found.films.append(path)
            else:
                found.problems.append(f"{path} cannot be read as a picture or a video")
        except UserError as error:
            found.problems.append(str(error))
    return found
