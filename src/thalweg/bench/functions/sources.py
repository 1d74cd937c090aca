"""What each function of a package says, as a hash: comments, docstrings and layout do not count."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

from thalweg.bench.functions.hooks import module_name

KERNELS = ("*.cu", "*.cuh")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def sources(root: Path) -> dict[str, str]:
    """Hashes by name, of all under the folder `root` of a package: functions ("thalweg.ops.registry:Resolver.resolve"),
    bodies of classes without their methods, modules without what they define (":<module>"), and CUDA C++ files."""
    found: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        module = module_name(f"{root}/", str(path))
        for name, text in _definitions(ast.parse(path.read_bytes()).body, ""):
            found.setdefault(f"{module}:{name}", []).append(text)
    for path in sorted(p for pattern in KERNELS for p in root.rglob(pattern)):
        found[f"{root.name}/{path.relative_to(root)}"] = [path.read_text(encoding="utf-8")]
    return {name: hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16] for name, texts in found.items()}


def _definitions(body: list[ast.stmt], inside: str) -> Iterator[tuple[str, str]]:
    """Names and texts, the body itself as "<module>" or its class's name. Functions within functions count as these."""
    rest: list[ast.stmt] = []
    for statement in body:
        if isinstance(statement, ast.ClassDef):
            yield from _definitions(statement.body, f"{inside}{statement.name}.")
            head = ast.ClassDef(statement.name, statement.bases, statement.keywords, [], statement.decorator_list)
            head.type_params = getattr(statement, "type_params", [])  # type: ignore[attr-defined]
            rest.append(head)
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{inside}{statement.name}", _text(statement)
        else:
            rest.append(statement)
    yield inside[:-1] or "<module>", "\n".join(ast.dump(s) for s in rest if not _is_docstring(s))


def _text(function: Definition) -> str:
    for node in ast.walk(function):
        if isinstance(node, Definition):
            node.body = [s for s in node.body if not _is_docstring(s)]
    return ast.dump(function)


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
