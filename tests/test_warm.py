"""What tests start does not outlive them, however they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.harness import ROOT, environment, until

STARTS_ONE = """
import sys, time
from pathlib import Path
from tests.harness import Fal
with Fal.started(Path(sys.argv[1])) as fal:
    print(fal.process.popen.pid, flush=True)
    time.sleep(60)
"""


def test_a_server_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTS_ONE, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
        os.kill(pid, 0)  # it is there
        run.send_signal(signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists(), what="the server has ended")
