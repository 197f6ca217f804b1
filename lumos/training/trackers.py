"""Dashboards that show a run beside its log file: TensorBoard, Weights & Biases, trackio.

Each library is imported only if logging.to names it.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import uuid
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lumos.durable import make_folder, sync_file, sync_folder
from lumos.errors import UserError
from lumos.files import write_bytes
from lumos.video.io import write_video

if TYPE_CHECKING:
    from lumos.training.settings import TrainingSettings

ID_FILE = "run_id"


class Writer(Protocol):
    """The interface of a dashboard, to which `RunLog` sends the numbers and clips of a run."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Show numbers of a step, by name."""

    def clip(self, step: int, name: str, path: Path, frames: np.ndarray, fps: float) -> None:
        """Show a clip uint8 [T, H, W, 3], which is also in the file `path`."""

    def sync(self) -> None:
        """Wait until the disk holds all data that the dashboard keeps on this machine."""

    def close(self) -> None:
        """End the connection to the dashboard."""


def check_installed(names: list[str]) -> None:
    """Raise UserError, which names the pip extra, if one of the libraries is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"logging.to names {name}, which is not installed; pip install 'lumos-video[{name}]', or leave it out "
                "(log.jsonl is always written)"
            )


def open_writers(settings: TrainingSettings, first_step: int) -> list[Writer]:
    """Return the dashboards that logging.to names, for a run that has done `first_step` steps."""
    writers: list[Writer] = []
    for name in settings.logging.to:
        if name == "tensorboard":
            writers.append(TensorBoard(settings.output_dir / name, first_step))
        else:
            writers.append(Tracker(importlib.import_module(name), settings))
    return writers


class TensorBoard:
    """Event files in <output_dir>/tensorboard.

    Values of steps after `first_step`, which an interrupted run has written, are hidden.
    """

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        make_folder(folder)
        self.writer, self.folder = SummaryWriter(str(folder), purge_step=first_step + 1), folder

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def clip(self, step: int, name: str, path: Path, frames: np.ndarray, fps: float) -> None:
        """Show the clip as an animated GIF, which TensorBoard displays like a picture."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        with tempfile.TemporaryDirectory() as folder:
            data = write_video(Path(folder) / "clip.gif", frames, min(fps, 50)).read_bytes()
        image = Summary.Image(height=frames.shape[1], width=frames.shape[2], colorspace=3, encoded_image_string=data)
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
        self.writer.flush()

    def sync(self) -> None:
        self.writer.flush()
        for file in self.folder.glob("events.*"):
            sync_file(file)
        sync_folder(self.folder)

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """Weights & Biases, or trackio, which has the same functions.

    A resumed run continues under the id that is stored in its folder. The environment variables of
    the libraries apply, for example WANDB_MODE=offline, WANDB_ENTITY and TRACKIO_DIR.
    """

    def __init__(self, module: ModuleType, settings: TrainingSettings):
        self.module = module
        file = settings.output_dir / ID_FILE
        if not file.exists():
            write_bytes(file, uuid.uuid4().hex[:12].encode())
        name = f"{settings.name}-{file.read_text()}"
        place = {"id": name, "dir": str(settings.output_dir)} if module.__name__ == "wandb" else {}
        try:
            module.init(project=settings.logging.project, name=name, config=settings.to_dict(), resume="allow", **place)
        except Exception as error:  # their exception types cannot be named without importing them
            raise UserError(
                f"{module.__name__} of logging.to cannot start: {error}; log in, set WANDB_MODE=offline for wandb, or leave it out"
            ) from error

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.module.log(values, step=step)

    def clip(self, step: int, name: str, path: Path, frames: np.ndarray, fps: float) -> None:
        shown = self.module.Image(str(path)) if path.suffix == ".png" else self.module.Video(str(path), format=path.suffix[1:])
        self.module.log({name: shown}, step=step)

    def sync(self) -> None:
        """Do nothing: the library itself decides when its files reach the disk."""

    def close(self) -> None:
        self.module.finish()
