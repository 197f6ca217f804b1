"""The folder `clips/` of a server: the status of each clip that clients of the API asked for, so that it survives a restart.

One JSON file for each clip, written when the clip is asked for and again when it has ended. A clip that was waiting or being made
when the server stopped is interrupted: its uploads are gone, so it cannot go on.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lumos.demo.store import RESULT
from lumos.demo.worker import ENDED, INTERRUPTED, ClipJob
from lumos.durable import make_folder, sweep_dead
from lumos.errors import RunError, UserError, printable
from lumos.files import read_json, write_json
from lumos.pipeline.request import Request
from lumos.progress import LOGGER
from lumos.settings import is_number, is_whole

ID = re.compile(r"[0-9a-f]{32}")
MAX_ENTRY_BYTES = 2**20
LATEST = 2**36  # seconds since 1970: the year 4147
RESULT_FIELDS = ("file", "seed", "seconds")
"""The keys of a clip's record that its status repeats; the whole record is stored beside the result."""


class Journal:
    """The files of one server. Nothing of them is served."""

    def __init__(self, root: Path):
        self.folder = root.resolve() / "clips"

    def save(self, job: ClipJob) -> None:
        """Write the status of a job. An error of the disk is logged: the clip itself goes on."""
        try:
            make_folder(self.folder)
            write_json(self._path(job.id), entry_of(job))
        except (UserError, RunError, OSError) as error:
            LOGGER.warning(printable(f"the status of a clip cannot be kept ({error}); it is lost when the server stops"))

    def forget(self, job: ClipJob) -> None:
        self._path(job.id).unlink(missing_ok=True)

    def jobs(self) -> list[ClipJob]:
        """Return the jobs of an earlier run of the server in the order in which they were asked for, each with its last state.

        Files that a server would not write are left out with a warning. Those of interrupted jobs are written anew.
        """
        if not self.folder.is_dir():
            return []
        sweep_dead(self.folder)
        found = []
        for path in self.folder.glob("*.json"):
            try:
                job = job_of(read_json(path, "the status of a clip", MAX_ENTRY_BYTES))
                if job.id != path.stem:
                    raise ValueError("it is named after another clip")
            except (UserError, ValueError, KeyError, TypeError) as error:
                LOGGER.warning(printable(f"{path} is not the status of a clip ({' '.join(str(error).split())}); delete it"))
                continue
            if not job.ended:
                job.state = INTERRUPTED
                self.save(job)
            found.append(job)
        return sorted(found, key=lambda job: job.created)

    def _path(self, called: str) -> Path:
        return self.folder / f"{called}.json"


def entry_of(job: ClipJob) -> dict[str, Any]:
    """Return what is kept of a job."""
    return {
        "id": job.id, "owner": job.owner, "status": job.state, "prompt": job.request.prompt, "seed": job.request.seed,
        "created": job.created, "progress": job.progress, "frames": job.made, "notes": list(job.notes),
        "error": str(job.error) if job.error else None,
        "result": {name: job.record[name] for name in RESULT_FIELDS} if job.record else None,
    }  # fmt: skip


def job_of(entry: dict[str, Any]) -> ClipJob:
    """Return the job of an entry. ValueError, KeyError or TypeError for an entry that `entry_of` does not make."""
    texts = all(isinstance(entry[name], str) for name in ("id", "owner", "status", "prompt"))
    numbers = all(is_number(entry[name]) for name in ("created", "progress")) and is_whole(entry["frames"])
    optional = isinstance(entry["error"], str | None) and (entry["seed"] is None or is_whole(entry["seed"]))
    notes = isinstance(entry["notes"], list) and all(isinstance(note, str) for note in entry["notes"])
    if not (texts and numbers and optional and notes and ID.fullmatch(entry["id"]) and 0 <= entry["created"] < LATEST):
        raise ValueError("a value is of another form")
    if entry["status"] not in ("waiting", "working", *ENDED):
        raise ValueError("its status is unknown")
    result = entry["result"]
    if result is not None:
        result = {name: result[name] for name in RESULT_FIELDS}
        if not (isinstance(result["file"], str) and RESULT.fullmatch(result["file"]) and is_whole(result["seed"])):
            raise ValueError("its result is none of a server")
    return ClipJob(
        Request.of(entry["prompt"], seed=entry["seed"]), owner=entry["owner"], state=entry["status"], progress=entry["progress"],
        notes=entry["notes"], error=RunError(entry["error"]) if entry["error"] else None, record=result, made=entry["frames"],
        id=entry["id"], created=entry["created"],
    )  # fmt: skip
