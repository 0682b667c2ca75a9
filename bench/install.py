"""What the benchmark needs beside this repository, installed when absent: nginx, wrk, Node.js, Express, LiteLLM."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from process import BenchError

BENCH = Path(__file__).resolve().parent
EXPRESS = BENCH / "express"
CACHE = BENCH / ".cache"
LITELLM = "litellm[proxy]==1.106.2"
PACKAGES = {"nginx": "nginx-light", "wrk": "wrk", "node": "nodejs", "npm": "npm"}


def express_modules() -> Path:
    """Where the official proxy is installed (Node's NODE_PATH)."""
    return CACHE / "express" / "node_modules"


def litellm_command() -> Path:
    """Where LiteLLM's proxy is installed: in an environment of its own, since it pins much."""
    return CACHE / "litellm" / "bin" / "litellm"


def install(stacks: list[str]) -> None:
    """Make ready what these stacks need; one line saying what to install where this process may not."""
    os.environ["PATH"] += os.pathsep + os.pathsep.join(("/usr/sbin", "/sbin"))  # where Debian puts nginx
    tools = ["nginx", "wrk"] + (["node", "npm"] if "official" in stacks else [])
    missing = [PACKAGES[tool] for tool in tools if shutil.which(tool) is None]
    if missing:
        _install_debian(missing)
    if "official" in stacks:
        _install_express()
    if "litellm" in stacks:
        _install_litellm()


def _install_litellm() -> None:
    folder = CACHE / "litellm"
    stamp = folder / "installed.txt"
    if stamp.exists() and stamp.read_text() == LITELLM:
        return
    _run([sys.executable, "-m", "venv", "--clear", str(folder)], dict(os.environ))
    _run([str(folder / "bin" / "pip"), "install", "--quiet", LITELLM], dict(os.environ))
    stamp.write_text(LITELLM)


def _install_debian(packages: list[str]) -> None:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise BenchError(f"please install {' '.join(packages)} (Debian: apt-get install {' '.join(packages)})")
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    _run(["apt-get", "update"], env)
    _run(["apt-get", "install", "-y", "--no-install-recommends", *packages], env)
    if "nginx-light" in packages and Path("/run/systemd/system").exists():
        _run(["systemctl", "disable", "--now", "nginx"], env)  # only the program was wanted, not a server on port 80


def _install_express() -> None:
    """npm install by `express/package.json`, again whenever that changes."""
    wanted = EXPRESS / "package.json"
    folder = CACHE / "express"
    stamp = folder / "installed.json"
    if stamp.exists() and stamp.read_bytes() == wanted.read_bytes():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(wanted, folder / "package.json")
    _run(["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--no-package-lock"], dict(os.environ))
    shutil.copy(wanted, stamp)


def _run(argv: list[str], env: dict[str, str]) -> None:
    done = subprocess.run(argv, check=False, env=env, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"{' '.join(argv)} failed: {(done.stderr or done.stdout).strip()[-500:]}")
