"""Installs a wheel into a clean environment and uses it as a stranger would; `make build` runs it.

The library alone answers a question and says what `thalweg serve` needs; with its extras it serves. On Linux the
environment then makes a wheel for this platform of it (platform_wheel.py), which answers without a compiler.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
import zipfile
from pathlib import Path

QUESTION = "Ben fills 6 boxes with 12 pears each. 7 pears are bad. How many good pears are there?"
ANSWER = "#### 65"
LEFT_OUT = ("fastapi", "uvicorn", "prometheus_client", "duckdb")  # of the library part


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", default="torch", metavar="REQUIREMENT", help="installed first and by itself")
    parser.add_argument("--no-platform-wheel", action="store_true", help="make no wheel with compiled code")
    given = parser.parse_args()
    wheel = given.wheel.resolve()
    _check_description(wheel)
    with tempfile.TemporaryDirectory(prefix="thalweg-wheel-") as folder:
        venv.create(folder, with_pip=True)
        binaries = Path(folder) / "bin"
        _install(binaries, given.torch)
        _install(binaries, str(wheel))
        _check_library(binaries)
        _install(binaries, f"{wheel}[all]")
        _check_server(binaries)
        if sys.platform == "linux" and not given.no_platform_wheel:
            _check_platform(binaries, wheel)
    print(f"{wheel.name}: installed, answered and served in a clean environment")
    return 0


def _check_description(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        [name] = [n for n in files.namelist() if n.endswith(".dist-info/METADATA")]
        text = files.read(name).decode()
    relative = re.search(r"\]\((?![a-z]+:|#)[^)]*\)", text)
    _need(relative is None, f"the description has a link that works only beside its files: {relative and relative[0]}")
    _need("## Quick start" in text, "the description is not README's")


def _check_library(binaries: Path) -> None:
    done = _run(binaries / "thalweg", "generate", "--chat", "--prompt", QUESTION)
    _need(done.returncode == 0 and ANSWER in done.stdout, f"thalweg generate said {done.stdout!r} {done.stderr!r}")
    found = f"import importlib.util as u; print([m for m in {LEFT_OUT!r} if u.find_spec(m)])"
    there = _run(binaries / "python", "-c", found).stdout.strip()
    _need(there == "[]", f"the library alone brought {there}")
    done = _run(binaries / "thalweg", "serve")
    said = done.returncode == 2 and "pip install 'thalweg[serve]'" in done.stderr
    _need(said, f"thalweg serve without its extra said {done.returncode} {done.stderr!r}")


def _check_server(binaries: Path) -> None:
    command = [binaries / "thalweg", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=binaries.parent) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            url = re.search(r"http://\S+(?=/v1)", line)
            _need(url is not None, f"thalweg serve said {line!r}")
            assert url is not None
            with urllib.request.urlopen(f"{url[0]}/health", timeout=10) as answer:
                _need(answer.status == 200, f"/health said {answer.status}")
            server.terminate()
            _need(server.wait(60) == 0, f"thalweg serve ended with {server.returncode}")
        finally:
            server.kill()


def _check_platform(binaries: Path, wheel: Path) -> None:
    subprocess.run([binaries / "python", Path(__file__).with_name("platform_wheel.py"), wheel], check=True)
    name = wheel.name.removesuffix("any.whl")
    [made] = wheel.parent.glob(f"{name}manylinux*.whl")
    _install(binaries, str(made), "--force-reinstall", "--no-deps")
    with tempfile.TemporaryDirectory() as empty:
        done = _run(binaries / "thalweg", "inspect", CXX="none", XDG_CACHE_HOME=empty)
        _need(" cpp" in done.stdout, f"without a compiler {made.name} ran in plain torch: {done.stdout} {done.stderr}")
        done = _run(binaries / "thalweg", "generate", "--chat", "--prompt", QUESTION, CXX="none", XDG_CACHE_HOME=empty)
    _need(done.returncode == 0 and ANSWER in done.stdout, f"{made.name} said {done.stdout!r} {done.stderr!r}")


def _install(binaries: Path, requirement: str, *options: str) -> None:
    began = time.monotonic()
    command = [binaries / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", *options, requirement]
    subprocess.run(command, check=True)
    print(f"installed {Path(requirement).name} in {time.monotonic() - began:.0f} s", flush=True)


def _run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    # From another folder, so that nothing of a checkout is imported.
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(command[0]).parent,
        timeout=300,
        check=False,
        env={**os.environ, **variables},
    )


def _need(ok: bool, fault: str) -> None:
    if not ok:
        sys.exit(f"error: {fault}")


if __name__ == "__main__":
    sys.exit(main())
