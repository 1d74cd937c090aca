"""A Jinja for templates nobody vouches for: rules for attributes, and bounds on time, steps and text.

Jinja's own sandbox bounds `range` alone. Here every loop pass and call counts, operators and joins are
measured, and the filters, globals and methods that chat templates have no use for are absent.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import BuiltinMethodType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

from thalweg.tokenizer import template_limits as limited
from thalweg.tokenizer.messages import NoContent

MAX_INT_BITS = 256

_STANDARD_FILTERS = (
    "abs count d default dictsort first float groupby int last length map max min"
    " reject rejectattr reverse select selectattr sort unique"
)
_TEXT_FILTERS = "capitalize lower title upper"
_LIMITED_FILTERS = {
    "indent": limited.indent,
    "items": limited.items,
    "join": limited.join,
    "list": limited.to_list,
    "replace": limited.replace,
    "safe": limited.text_of,
    "string": limited.text_of,
    "tojson": limited.tojson,
    "trim": limited.trim,
}
_STR_METHODS = (
    "capitalize count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace"
    " istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition"
    " rsplit rstrip split splitlines startswith strip title upper"
)
_METHODS: list[tuple[type, frozenset[str]]] = [
    (str, frozenset(_STR_METHODS.split())),
    (dict, frozenset(("copy", "get", "items", "keys", "values"))),
    (list, frozenset(("copy", "count", "index"))),
    (tuple, frozenset(("count", "index"))),
    (float, frozenset(("is_integer",))),
    (int, frozenset()),
    (type, frozenset()),
]


def _loop_pass() -> None:
    """Called at the beginning of every loop pass; being a call is what counts it."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment chat templates are compiled in. Render within template_limits.limits()."""

    loop_pass = staticmethod(_loop_pass)
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _GenerationTag],
            finalize=limited.text_of,
            optimized=False,
        )
        standard = self.filters
        self.filters = {name: standard[name] for name in _STANDARD_FILTERS.split()}
        self.filters |= {name: limited.on_text(standard[name]) for name in _TEXT_FILTERS.split()}
        self.filters |= _LIMITED_FILTERS
        self.tests = self.tests | {"none": lambda value: value is None or isinstance(value, NoContent)}
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace")}
        self.globals |= {"raise_exception": limited.raise_exception, "strftime_now": limited.strftime_now}

    def compile_template(self, source: str) -> jinja2.Template:
        """Raises jinja2.TemplateError on a template that does not parse or asks for what is not here."""
        tree = self.parse(source)
        elsewhere = (
            nodes.Include,
            nodes.Import,
            nodes.FromImport,
            nodes.Extends,
            nodes.ScopedEvalContextModifier,
        )
        for node in tree.find_all(elsewhere):
            raise jinja2.TemplateSyntaxError("include, import, extends and autoescape are not available", node.lineno)
        return self.from_string(_Limited().visit(tree))

    def concat_values(self, *values: Any) -> str:
        return limited.concat(values)

    def concat(self, pieces: Iterable[str]) -> str:
        """Jinja joins the output and the body of every macro, {% set %} and {% filter %} block with this."""
        return limited.concat(pieces)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        # The underscores keep the names free for the template's own keyword arguments.
        limited.count_step()
        if __obj is _loop_pass:
            return None
        if isinstance(__obj, BuiltinMethodType) and isinstance(__obj.__self__, str):
            for own in ("_loop_vars", "_block_vars"):  # Jinja's compiler adds these to every call inside a block
                kwargs.pop(own, None)
            limited.allow_chars(len(__obj.__self__))
            if __obj.__name__ == "replace":
                return limited.replace(__obj.__self__, *args, **kwargs)
            if __obj.__name__ == "join":
                (pieces,) = args
                return limited.concat(pieces, __obj.__self__)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise SecurityError("'%' on a text is not available; '~' joins texts")
        sized = [side for side in (left, right) if isinstance(side, (str, list, tuple))]
        if sized:
            size = sum(map(len, sized))
            if operator == "*":
                size *= next((side for side in (left, right) if isinstance(side, int)), 1)
            if isinstance(sized[0], str):
                limited.allow_chars(max(size, 0))
            else:
                limited.allow(max(size, 0), limited.MAX_ITEMS, "items in a list")
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length()
            if operator == "**":
                bits = left.bit_length() * abs(right)
            limited.allow(bits, MAX_INT_BITS, "bits in a number")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, allowed in _METHODS:
            if isinstance(obj, kind):
                return attr in allowed
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        if super().wrap_str_format(value) is not None:
            raise SecurityError("str.format is not available; '~' joins texts")

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        # Jinja's own gives a value that prints as nothing; a template that tries this is not worth going on
        # with.
        raise SecurityError(f"attribute {attribute[:80]!r} of a {type(obj).__name__} is not available")


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks, for training, what a model wrote; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - the form Jinja asks for

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Limited(NodeTransformer):
    """Makes every loop pass a call, and sends `~` through the measured concatenation."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("loop_pass", []), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("concat_values", node.nodes).set_lineno(node.lineno)


def _call(name: str, args: list[nodes.Expr]) -> nodes.Node:
    return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)
