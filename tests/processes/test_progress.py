"""Progress: a bar on a terminal, lines in a log."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from helpers.repo import REPO

LOOP = """
import sys, time
from bge_accel.processes import progress
progress.LOG_SECONDS = {seconds}
with progress.progress({total}, "encoding", "text", shown={shown}) as bar:
    for _ in range(4):
        time.sleep(0.05)
        bar.update(1000)
print("done", file=sys.stderr)
"""


def run(*, seconds=60.0, total=4000, shown=True):
    code = LOOP.format(seconds=seconds, total=total, shown=shown)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO).stderr


def test_a_log_gets_lines_and_no_bars():
    lines = run(seconds=0.04).splitlines()
    assert len(lines) > 2 and lines.pop() == "done"
    for line in lines:
        assert re.fullmatch(r"encoding: \d000 of 4000 texts, 00:00 gone, 00:00 to go, +[\d.]+texts?/s", line), line


def test_what_takes_less_than_a_minute_says_nothing():
    assert run() == "done\n"


@pytest.mark.parametrize("total", [4000, None])
def test_what_is_not_shown_is_not_there(total):
    assert run(seconds=0.04, total=total, shown=False) == "done\n"


def test_without_a_total_it_counts():
    line, *_ = run(seconds=0.04, total=None).splitlines()
    assert re.fullmatch(r"encoding: \d000 texts, 00:00 gone, +[\d.]+texts?/s", line), line


def test_a_terminal_gets_a_bar():
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    code = LOOP.format(seconds=60, total=4000, shown=True)
    with subprocess.Popen([sys.executable, "-c", code], stderr=its, cwd=REPO) as process:
        os.close(its)
        seen = b""
        try:
            while part := os.read(ours, 4096):
                seen += part
        except OSError:  # how the end of a terminal is said
            pass
        assert process.wait() == 0
    os.close(ours)
    assert b"\r" in seen and b"100%" in seen and b"4000/4000" in seen
