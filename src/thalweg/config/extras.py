"""Parts of the package that need more libraries than it brings, and what installs those."""

from __future__ import annotations

EXTRAS = {  # module: the extra that has it
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "pydantic", "pydantic_core", "prometheus_client"), "serve"),
    "duckdb": "trace",
    "huggingface_hub": "hub",
    "ray": "ray",
}


def why_missing(error: ModuleNotFoundError) -> str | None:
    """What to install for a module that is not there; None for one that no extra has."""
    module = (error.name or "").partition(".")[0]
    if (extra := EXTRAS.get(module)) is None:
        return None
    return f"this needs {module}, which is not installed; pip install 'thalweg[{extra}]'"
