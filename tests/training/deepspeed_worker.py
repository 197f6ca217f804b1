"""One of the processes of tests/training/test_deepspeed.py: trains with each ZeRO stage, whole and with a break.

usage: deepspeed_worker.py settings.json folder stage...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lumos.training.loop import Run, train
from lumos.training.settings import build_settings


class Killed(Exception):
    pass


def main(settings_file: str, folder: str, *stages: str) -> None:
    raw = json.loads(Path(settings_file).read_text())
    report = Run._report

    def killed(run: Run) -> None:
        report(run)
        if run.step == 3:
            raise Killed

    for stage in stages:
        raw["deepspeed"]["zero_stage"] = int(stage)
        for name, breaks in (("whole", False), ("broken", True)):
            raw["training"]["output_dir"] = f"{folder}/zero{stage}-{name}"
            settings = build_settings(raw)
            if breaks:
                Run._report = killed
                try:
                    train(settings)
                except Killed:
                    Run._report = report
            train(settings)


if __name__ == "__main__":
    main(*sys.argv[1:])
