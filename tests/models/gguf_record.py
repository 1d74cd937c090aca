"""scripts/record_gguf.py as a module: tests make the same record of our files."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "record_gguf.py"
_spec = spec_from_file_location("record_gguf", _SCRIPT)
assert _spec is not None
assert _spec.loader is not None
_module = module_from_spec(_spec)
_spec.loader.exec_module(_module)
held = _module.held
