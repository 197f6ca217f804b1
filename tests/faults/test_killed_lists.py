"""Kills of a list of clips: when it is resumed, every clip is there, and equal to the one of a list that was not killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KILLED = f"ended with {-signal.SIGKILL}"


def clips(out: Path) -> dict[str, bytes]:
    """Return the bytes of the clips by name. Records hold times, so they differ from run to run."""
    files = [path for path in out.rglob("*") if path.is_file() and path.suffix in (".mp4", ".webp")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and kills by signal")
def test_a_killed_list_of_clips_is_resumed(micro_folder, tmp_path, forks, times):
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    environment.pop("WORLD_SIZE", None)
    calls = times(3, 6)
    done = forks.run([HERE / "killed_lists.py", tmp_path, micro_folder, calls, times(1, 2)], env=environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    assert done.stdout.count(KILLED) >= calls, done.stdout
    whole = clips(tmp_path / "whole")
    assert len(whole) == 5
    left = [clips(out) for out in tmp_path.glob("*.killed")]
    assert len({len(found) for found in left}) > 1
    for found in left:  # a clip that is there under its name is whole
        assert all(whole[name] == data for name, data in found.items() if not name.startswith(".unfinished"))
    for out in [*tmp_path.glob("call-*"), *tmp_path.glob("time-*")]:
        if not out.name.endswith(".killed"):
            assert clips(out) == whole, out
            assert not (out / ".unfinished").exists(), out
            for name in whole:
                assert json.loads((out / f"{name}.json").read_text())["bytes"] == len(whole[name])
