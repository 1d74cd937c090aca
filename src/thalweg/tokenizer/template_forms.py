"""In which form a chat template takes content and arguments, told by its syntax tree.

Both are followed through variables and the parameters of macros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from jinja2 import nodes

Form = Literal["text", "parts", "either"]

# Filters that give the items of what they are applied to, or some of them; and those that pass it on.
_ON_ITEMS = {"dictsort", "items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"}
_PASSING = {"d", "default", "list", "reject", "rejectattr", "reverse", "select", "selectattr"}


def content_form(tree: nodes.Template) -> Form:
    """`text`: content is used as a string alone. `parts`: the template loops over it, or takes parts of it.
    `either`: it does so too, and asks first whether the content is a string.
    """
    return _form(tree, "content")


def prints_arguments(tree: nodes.Template) -> bool:
    """Whether the template asks if arguments are a string, and never takes them apart: then it prints a string as
    it is, and writes an object as JSON.
    """
    return _form(tree, "arguments") == "text" and _asks_for_string(tree, "arguments")


def _form(tree: nodes.Template, key: str) -> Form:
    names = _names_of(tree, key)
    if not any(_is(value, key, names) for value in _iterated(tree)):
        return "text"
    return "either" if _asks_for_string(tree, key) else "parts"


def _asks_for_string(tree: nodes.Template, key: str) -> bool:
    names = _names_of(tree, key)
    return any(test.name == "string" and _is(test.node, key, names) for test in tree.find_all(nodes.Test))


def _iterated(tree: nodes.Template) -> Iterator[nodes.Node]:
    for loop in tree.find_all(nodes.For):
        yield loop.iter
    for filtered in tree.find_all(nodes.Filter):
        if filtered.name in _ON_ITEMS and filtered.node is not None:
            yield filtered.node
    access: Any
    for access in tree.find_all(nodes.Getattr):  # arguments.items()
        if access.attr in ("items", "keys", "values"):
            yield access.node
    for access in tree.find_all((nodes.Getattr, nodes.Getitem)):  # content[0].text
        item = access.node
        if isinstance(item, nodes.Getitem) and isinstance(item.arg, nodes.Const) and isinstance(item.arg.value, int):
            yield item.node


def _is(node: nodes.Node | None, key: str, names: set[str]) -> bool:
    match node:
        case nodes.Name():
            return node.name in names
        case nodes.Getattr():
            return node.attr == key
        case nodes.Getitem():
            return isinstance(node.arg, nodes.Const) and node.arg.value == key
        case nodes.Call(node=nodes.Getattr(attr="get")):
            return bool(node.args) and isinstance(node.args[0], nodes.Const) and node.args[0].value == key
        case nodes.Filter():
            return node.name in _PASSING and _is(node.node, key, names)
        case nodes.CondExpr():
            return _is(node.expr1, key, names) or _is(node.expr2, key, names)
        case nodes.And() | nodes.Or():
            return _is(node.left, key, names) or _is(node.right, key, names)
    return False


def _names_of(tree: nodes.Template, key: str) -> set[str]:
    """Variables and parameters that hold what `key` names somewhere in the template."""
    bindings = list(_bindings(tree))
    names: set[str] = set()
    while new := {name for name, value in bindings if name not in names and _is(value, key, names)}:
        names |= new
    return names


def _bindings(tree: nodes.Template) -> Iterator[tuple[str, nodes.Node]]:
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name):
            yield assign.target.name, assign.node
    for block in tree.find_all(nodes.With):
        for target, value in zip(block.targets, block.values, strict=False):
            if isinstance(target, nodes.Name):
                yield target.name, value
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and (macro := macros.get(call.node.name)) is not None:
            for parameter, value in zip(macro.args, call.args, strict=False):
                yield parameter.name, value
            for named in call.kwargs:
                yield named.key, named.value
