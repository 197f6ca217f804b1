"""Run one function of a benchmark in a separate process, so that only its own memory is measured.

`run_isolated` runs in the parent. It starts `python -m lumos.benchmarks.isolated` as the child, which reads
the call from stdin as JSON and writes the result as the last line of stdout.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from lumos.errors import RunError, UserError


def run_isolated(module: str, function: str, arguments: dict[str, Any], *, threads: int, what: str) -> Any:
    """Call <module>.<function>(**arguments) in a new process and return the result.

    Arguments and result are plain JSON values. A UserError or RunError of the function is raised here too.
    Raises RunError if the process dies. `what` names the measurement in messages.
    """
    call = json.dumps({"module": module, "function": function, "arguments": arguments, "threads": threads})
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "lumos.benchmarks.isolated"],
        input=call, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
    if done.returncode == 2:
        raise UserError(reason)
    if done.returncode == -signal.SIGKILL:
        reason = "it was killed, most likely because memory ran out; make it smaller or free memory"
    raise RunError(f"measuring {what} failed: {reason}")


def main() -> int:
    import torch

    from lumos.cli import fail

    call = json.load(sys.stdin)
    torch.set_num_threads(call["threads"])
    module = importlib.import_module(call["module"])
    try:
        result = getattr(module, call["function"])(**call["arguments"])
    except ValueError as error:
        return fail(error, 2)
    except (RunError, OSError, MemoryError) as error:
        return fail(error, 1)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
