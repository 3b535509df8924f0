"""The coordinator's end of a worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.records import to_json

__all__ = ["Client", "RunnerError", "end_session", "environment", "run_module"]

ROOT = Path(__file__).parents[2]  # where `train` can be imported from


class RunnerError(Exception):
    """A runner raised, or its process died; the message gives the reason."""


def environment(device: str, threads: int, cache: Path) -> dict[str, str]:
    """Make the environment of a worker, with equal threads for all and its own caches.

    JAX is told to keep compiled programs on disk, as fdl and Inductor do.
    """
    return os.environ | {
        "FDL_JIT": "1",
        "FDL_CACHE": str(cache / "fdl"),
        "OMP_NUM_THREADS": str(threads),
        "NPROC": str(threads),  # XLA's pool on the CPU
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "JAX_PLATFORMS": device,
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # else each JAX runner takes most of the GPU
    }


class Client:
    """One worker process, in a session of its own: Ctrl-C does not reach it, `end` kills it all."""

    def __init__(self, runner: str, task: Path, env: dict[str, str], log: Path) -> None:
        self.log = log
        self.warned: list[str] = []  # warnings of the runner up to its last answer
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "train.bench.worker", runner, str(task)],
                cwd=ROOT,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def read(self) -> dict[str, Any]:
        """Read one answer.

        Raises:
            RunnerError: the answer is an error, or the process has ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RunnerError(self._epitaph())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RunnerError(answer["error"])
        self.warned = answer.pop("warned", [])
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and read its answer; raises as `read` does."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(to_json({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise RunnerError(self._epitaph()) from None
        return self.read()

    def end(self) -> None:
        """Kill the process and all that it started, such as loaders and compilers."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # a command not read by a dead process
                    pipe.close()
        end_session(self.process)

    def _epitaph(self) -> str:
        code = self.process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = [line for line in self.log.read_text().splitlines() if line.strip()]
        return f"the process ended with {how}: {lines[-1].strip() if lines else ''}"[:200]


def end_session(process: subprocess.Popen[str]) -> None:
    """Kill a process that leads a session, and the whole session."""
    if process.returncode is None:  # else another process may have its number by now
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_module(module: str, *args: str, env: dict[str, str]) -> str:
    """Run a module of the benchmark and return its output.

    Raises:
        RunnerError: the module failed; the message is its last line.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, *args],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate()
    finally:
        end_session(process)
    if process.returncode:
        raise RunnerError((err.strip().splitlines() or [f"{module} failed"])[-1][:200])
    return out
