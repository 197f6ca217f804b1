"""Where a run can be watched beside its log file: TensorBoard, Weights & Biases, trackio. Each is imported when asked for."""

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
    """What a run tells a dashboard."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def clip(self, step: int, name: str, path: Path, frames: np.ndarray, fps: float) -> None: ...

    def sync(self) -> None:
        """Have the disk hold what was told so far, where it is kept on this machine."""

    def close(self) -> None: ...


def check_installed(names: list[str]) -> None:
    """UserError, with the pip extra, if one of logging.to is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"logging.to names {name}, which is not installed; pip install 'lumos-video[{name}]', or leave it out "
                "(log.jsonl is always written)"
            )


def open_writers(settings: TrainingSettings, first_step: int) -> list[Writer]:
    """The writers of logging.to for a run that has done `first_step` steps."""
    writers: list[Writer] = []
    for name in settings.logging.to:
        if name == "tensorboard":
            writers.append(TensorBoard(settings.output_dir / name, first_step))
        else:
            writers.append(Tracker(importlib.import_module(name), settings))
    return writers


class TensorBoard:
    """Event files in <output_dir>/tensorboard. What an earlier run wrote past `first_step` is hidden there."""

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        make_folder(folder)
        self.writer, self.folder = SummaryWriter(str(folder), purge_step=first_step + 1), folder

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def clip(self, step: int, name: str, path: Path, frames: np.ndarray, fps: float) -> None:
        """As a picture that moves: a gif, which TensorBoard shows as it is."""
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
    """Weights & Biases, or trackio, which has the same calls. A resumed run goes on under the id kept in its folder.

    Their own environment variables hold: WANDB_MODE=offline, WANDB_ENTITY, TRACKIO_DIR and so on.
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
        except Exception as error:  # their own kinds of error, which cannot be named without them
            raise UserError(
                f"{module.__name__} of logging.to cannot start: {error}; log in, set WANDB_MODE=offline for wandb, or leave it out"
            ) from error

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.module.log(values, step=step)

    def clip(self, step: int, name: str, path: Path, frames: np.ndarray, fps: float) -> None:
        shown = self.module.Image(str(path)) if path.suffix == ".png" else self.module.Video(str(path), format=path.suffix[1:])
        self.module.log({name: shown}, step=step)

    def sync(self) -> None:
        """Their own files are theirs to keep."""

    def close(self) -> None:
        self.module.finish()
