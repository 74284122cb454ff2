"""A peer's process: started once, asked case by case, asleep while another is measured."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchnorm.bench import programs


class Failed(Exception):
    """A peer could not do a case; the text says why."""


class Process:
    """A server that answers a line with a line of JSON: peer.py, or batchnorm-peer-onednn.

    Only the one that was asked runs: `ask` returns when all threads of the process sleep. Workers that wait by spinning
    would take the core of whoever is measured next.
    """

    PATIENCE = 600.0  # seconds for one case

    def __init__(self, key: str, threads: int, folder: Path | None) -> None:
        self.key, self.threads, self.folder = key, threads, folder
        self.name, self.version = key, ""
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> str:
        """Start it. Returns why it cannot be, or nothing."""
        command = self._command()
        if not command:
            return "batchnorm-peer-onednn was not found; it is built where CMake finds oneDNN 3"
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
        )
        try:
            hello = self._line()
        except Failed as failed:
            return str(failed)
        if "absent" in hello:
            self.stop()
            return str(hello["absent"])
        self.name, self.version = hello["peer"], hello["version"]
        return ""

    def ask(self, shape: Sequence[int], rounds: int, norm: str) -> list[dict[str, Any]]:
        """Measure one case of a norm. Raises Failed; the next call starts a process that has ended."""
        if self._process is None and (reason := self.start()):
            raise Failed(reason)
        load = OthersLoad(self._pid())
        answer = self._line(f"{'x'.join(map(str, shape))} {rounds} {norm}\n")
        if "error" in answer:
            raise Failed(answer["error"])
        others = load.processors()
        self._wait_until_asleep()
        return [{**row, "others": others} for row in answer["rows"]]

    def stop(self) -> None:
        """End the process and forget it."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _command(self) -> list[str]:
        if self.key == "onednn":
            program = programs.find("batchnorm-peer-onednn", self.folder)
            return [str(program)] if program else []
        # -P: the folder of the script is no place to import from; the peers see no module of this package there.
        script = Path(__file__).with_name("peer.py")
        return [sys.executable, "-P", str(script), self.key, "--threads", str(self.threads)]

    def _line(self, request: str = "") -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                text = process.stdout.readline() if selector.select(self.PATIENCE) else ""
            answer: dict[str, Any] = json.loads(text)
        except (OSError, ValueError):
            self.stop()
            raise Failed(f"it ended, or took longer than {self.PATIENCE:g} s") from None
        return answer

    def _wait_until_asleep(self) -> None:
        """Return when no thread of the process is in state R, or after half a second."""
        until = time.monotonic() + 0.5
        tasks = Path(f"/proc/{self._pid()}/task")
        while time.monotonic() < until:
            states = [_state(task) for task in tasks.iterdir()] if tasks.is_dir() else []
            if states and "R" not in states:
                return
            time.sleep(0.002)


class OthersLoad:
    """Processors that all processes but one kept busy on average since the construction."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.start = self._seconds()

    def processors(self) -> float:
        """Give their number: 0 where the system does not tell."""
        clock, others = (end - start for end, start in zip(self._seconds(), self.start, strict=True))
        return max(0.0, others / clock)

    def _seconds(self) -> tuple[float, float]:
        try:
            # user, nice, system, idle, iowait, irq, softirq, steal
            ticks = [int(word) for word in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
            own = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        except OSError:
            return time.monotonic(), 0.0
        busy = sum(ticks) - ticks[3] - ticks[4] - sum(map(int, own))
        return time.monotonic(), busy / os.sysconf("SC_CLK_TCK")


def _state(task: Path) -> str:
    """Give the letter after the name in brackets, or nothing where the thread is gone."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
