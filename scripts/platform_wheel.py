"""Makes a wheel for this kind of Linux machine of a pure one: the CPU's ops are in it, compiled for every set of
instructions, so that a machine without a compiler runs them too.

    python scripts/platform_wheel.py dist/thalweg-0.1.0-py3-none-any.whl

It needs Thalweg, installed from that wheel, and a C++ compiler; `make build` runs it (scripts/check_wheel.py). The
wheel lies beside the other one. Its tag names the newest version of the C library that the code asks for. The C++
library is the machine's, as for torch.
"""

from __future__ import annotations

import base64
import hashlib
import platform
import re
import sys
import tempfile
import zipfile
from pathlib import Path

from thalweg.ops.toolchain import cpu_build


def main() -> None:
    pure = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        libraries = {level.name: Path(folder, f"{level.name}.so") for level in cpu_build.levels()}
        for level in cpu_build.levels():
            cpu_build.compile_for(level, libraries[level.name])
        code = {f"thalweg/{_place(name)}": path.read_bytes() for name, path in libraries.items()}
    tag = f"manylinux_2_{max(map(newest_glibc, code.values()))}_{platform.machine()}"
    made = pure.with_name(pure.name.replace("-any.whl", f"-{tag}.whl"))
    write(pure, made, tag, code)
    print(f"{made.name}: {made.stat().st_size >> 10} KiB, {len(code)} sets of instructions")


def newest_glibc(library: bytes) -> int:
    """n of the newest version 2.n of the C library that the code asks for."""
    return max(int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", library))


def write(pure: Path, made: Path, tag: str, added: dict[str, bytes]) -> None:
    """A wheel with the files of another one, and some more, for one platform."""
    with zipfile.ZipFile(pure) as source:
        files = {info.filename: source.read(info) for info in source.infolist()} | added
    [about] = [name for name in files if name.endswith(".dist-info/WHEEL")]
    files[about] = files[about].replace(b"Root-Is-Purelib: true", b"Root-Is-Purelib: false")
    files[about] = files[about].replace(b"Tag: py3-none-any", f"Tag: py3-none-{tag}".encode())
    record = about.replace("WHEEL", "RECORD")
    del files[record]
    lines = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in files.items()]
    files[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    with zipfile.ZipFile(made, "w") as target:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            target.writestr(info, data)


def _place(level: str) -> Path:
    """Of a level's library below the package's folder."""
    return (cpu_build.SHIPPED / f"{level}.so").relative_to(cpu_build.OPS.parent)


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    main()
