"""Runs of the training command in several processes, with faults such as kills, stops and full disks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from lumos.training.settings import TrainingSettings

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Ended:
    """The exit code of a process (negative: the signal; None: it had to be killed) and the end of its stderr."""

    code: int | None
    err: str

    @property
    def error(self) -> str:
        return "".join(line for line in self.err.splitlines() if line.startswith("error"))


class Ranks:
    """One server process (ranks_server.py) that imports everything once and forks the processes of each run."""

    def __init__(self, folder: Path):
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, str(Path(__file__).with_name("ranks_server.py"))]
        self.log = open(folder / "server.err", "w")  # noqa: SIM115
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )

    def train(
        self, settings: TrainingSettings, engine: str = "zero2", world: int = 2, faults: dict | None = None, seconds: float = 900
    ) -> list[Ended]:
        """Run the settings in `world` processes.

        engine: "plain", "zero0", "zero2-offload" and so on, or "own" for the engine of the settings.

        faults: {rank: [[name, argument, ...], ...]}, functions of ranks_server.py.
        """
        raw = settings.to_dict()
        if engine.endswith("-offload"):
            raw["deepspeed"]["config"] = str(ROOT / "configs" / "deepspeed" / f"{engine}.json")
        elif engine.startswith("zero"):
            raw["deepspeed"]["zero_stage"] = int(engine.removeprefix("zero"))
        return self.run("train", raw, world, plain=engine == "plain", faults=faults, seconds=seconds)

    def run(
        self, verb: str, raw: dict, world: int = 2, *, plain: bool = False, faults: dict | None = None, seconds: float = 900
    ) -> list[Ended]:
        """Run a training verb with the contents of a config file; plain: without a launcher's environment."""
        config = self.folder / "config.yaml"
        config.write_text(yaml.safe_dump(raw))
        job = {"folder": str(self.folder), "verb": verb, "config": str(config), "overrides": [], "world": world, "plain": plain,
               "faults": faults or {}, "seconds": seconds}  # fmt: skip
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, (self.folder / "server.err").read_text()[-3000:]
        return [Ended(**process) for process in json.loads(answer)]

    def finish(self, settings: TrainingSettings, engine: str = "zero2", world: int = 2, **options) -> Path:
        """Train to the end without an error and return the run's folder."""
        for process in self.train(settings, engine, world, **options):
            assert process.code == 0, process.err
        return settings.output_dir

    def close(self) -> None:
        self.server.kill()
        self.server.wait()
        self.log.close()


class Runs:
    """Runs that several tests share; each is made once. `make(output_dir)` returns their settings."""

    def __init__(self, ranks: Ranks, folder: Path, make):
        self.ranks, self.folder, self.make = ranks, folder, make

    def whole(self, engine: str, world: int = 2) -> Path:
        """Return the folder of an uninterrupted run; "plain" is one process."""
        folder = self.folder / f"{engine}-{world}-whole"
        if not folder.exists():
            self.ranks.finish(self.make(folder), engine, 1 if engine == "plain" else world)
        return folder

    def killed(self, engine: str, world: int, copy: str) -> Path:
        """Return a copy of a run whose last process was killed after step 3, with the checkpoint of step 2."""
        folder = self.folder / f"{engine}-{world}-killed"
        if not folder.exists():
            *others, last = self.ranks.train(self.make(folder), engine, world, {world - 1: [["kill_after_step", 3]]})
            assert last.code == -9, last.err
            assert all(other.code == 1 and "another process of the run" in other.error for other in others), others
        shutil.copytree(folder, self.folder / copy)
        return self.folder / copy
