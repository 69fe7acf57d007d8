"""Programs in new processes in which what they import first is imported already.

Most of the time of a short program is the import of PyTorch. A server imports it once; a fork of
the server runs each program, with its own folder, environment and output. A test of importing
itself, or of settings that are fixed at an import, starts Python.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["run_program"]

_SERVER = """
import json, os, sys, traceback
exec(sys.argv[1], {})
os.write(3, b"\\n")
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        os.close(3)
        for descriptor, path in (1, request["stdout"]), (2, request["stderr"]):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.path[:0] = [p for p in request["env"].get("PYTHONPATH", "").split(os.pathsep) if p]
        sys.argv = ["-c", *request["arguments"]]
        status = 0
        try:
            exec(compile(request["program"], "<string>", "exec"), {"__name__": "__main__"})
        except SystemExit as error:
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    _, status = os.waitpid(child, 0)
    os.write(3, f"{os.waitstatus_to_exitcode(status)}\\n".encode())
"""


@cache
def _server(setup: str) -> tuple[subprocess.Popen[str], Any]:
    ours, theirs = os.pipe()

    def give() -> None:
        os.dup2(theirs, 3)

    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER, setup],
        stdin=subprocess.PIPE,
        text=True,
        preexec_fn=give,
        pass_fds=[3],
    )
    os.close(theirs)
    atexit.register(process.kill)
    answers = os.fdopen(ours)
    assert answers.readline() == "\n", f"failed: {setup}"
    return process, answers


def run_program(
    program: str,
    *arguments: str,
    setup: str = "import torch",
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program as `python -c` would, in a fork of a process that has run `setup`."""
    process, answers = _server(setup)
    assert process.stdin is not None
    with tempfile.TemporaryDirectory() as folder:
        outputs = {name: str(Path(folder) / name) for name in ("stdout", "stderr")}
        request = {
            "program": program,
            "arguments": arguments,
            "cwd": str(cwd or Path.cwd()),
            "env": {**os.environ} if env is None else env,
            **outputs,
        }
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        status = int(answers.readline())
        stdout, stderr = (Path(path).read_text() for path in outputs.values())
    return subprocess.CompletedProcess([sys.executable, "-c", program], status, stdout, stderr)
