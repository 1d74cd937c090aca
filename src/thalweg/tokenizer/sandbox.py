"""A Jinja for templates that are not trusted: rules for attributes, and bounds on time, steps and text.

What Jinja's own sandbox renders, this one renders, to the same text; but that one bounds `range` alone. Here every
loop pass, call and filter counts, operators, comparisons, joins and formats are measured. What reads other templates,
{% autoescape %} and methods that make bytes are absent, and an attribute that is not safe ends the render.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import BuiltinMethodType, MethodType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from thalweg.tokenizer import template_filters, template_text
from thalweg.tokenizer import template_limits as limited
from thalweg.tokenizer.tool_arguments import Arguments

MAX_INT_BITS = 256

_STR_METHODS = (
    "capitalize casefold center count endswith expandtabs find index isalnum isalpha isascii isdecimal isdigit"
    " isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip maketrans partition"
    " removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip"
    " striptags swapcase title translate unescape upper zfill"
)
_DICT_METHODS = ("copy", "fromkeys", "get", "items", "keys", "values")
_METHODS: list[tuple[type, frozenset[str]]] = [
    (str, frozenset(_STR_METHODS.split())),
    (Arguments, frozenset((*_DICT_METHODS, *_STR_METHODS.split()))),
    (dict, frozenset(_DICT_METHODS)),
    (list, frozenset(("copy", "count", "index"))),
    (tuple, frozenset(("count", "grouper", "index", "list"))),  # groupby gives tuples with names
    (float, frozenset(("as_integer_ratio", "conjugate", "fromhex", "hex", "imag", "is_integer", "real"))),
    (
        int,
        frozenset(
            ("as_integer_ratio", "bit_count", "bit_length", "conjugate", "denominator", "imag", "numerator", "real")
        ),
    ),
    (type, frozenset()),
]


def _loop_pass() -> None:
    """Called at the beginning of every loop pass; being a call is what counts it."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment chat templates are compiled in. Render within template_limits.limits()."""

    loop_pass = staticmethod(_loop_pass)
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _GenerationTag],
            finalize=limited.text_of,
            optimized=False,
        )
        self.filters = template_filters.filters()
        self.tests.update(template_filters.tests())
        self.globals |= template_filters.globals_() | {"range": self.globals["range"]}

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
        owner = __obj.__self__ if isinstance(__obj, (BuiltinMethodType, MethodType)) else None
        if isinstance(owner, str):
            args, kwargs = template_text.measured_method(owner, __obj.__name__, args, kwargs)
        elif owner is not None or __obj is dict:  # what compares or hashes its arguments
            limited.comparable(args)
            if getattr(__obj, "__name__", "") == "copy":
                limited.sliceable(owner)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str) and isinstance(right, Arguments):
            right = str(right)
        elif operator == "+" and isinstance(left, Arguments) and isinstance(right, str):
            left = str(left)
        if operator == "%" and isinstance(left, str):
            return template_text.percent(left, right)
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

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        return template_text.formatting(self, value.__self__, from_mapping=value.__name__ == "format_map")

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        # Jinja's own gives a value that prints as nothing; a template that tries this is not worth going on
        # with.
        raise SecurityError(f"attribute {attribute[:80]!r} of a {type(obj).__name__} is not available")


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks, for training, what a model wrote; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - the form Jinja asks for

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        inside: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return inside


class _Limited(NodeTransformer):
    """Makes every loop pass a call, and has measured what is concatenated, compared, sliced or a key."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("loop_pass", []), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("concat_values", node.nodes).set_lineno(node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _through("_comparable", node.expr)
        for operand in node.ops:
            operand.expr = _through("_comparable", operand.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.key = _through("_comparable", node.key)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _through("_sliceable", node.node)
        else:
            node.arg = _through("_comparable", node.arg)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if node.name == "attr" and any(isinstance(arg, nodes.Const) and str(arg.value)[:1] == "_" for arg in node.args):
            raise jinja2.TemplateSyntaxError("attributes with an underscore are not available", node.lineno)
        return node


def _call(name: str, args: list[nodes.Expr]) -> nodes.Node:
    return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)


def _through(name: str, value: nodes.Expr) -> nodes.Expr:
    if isinstance(value, nodes.Const):
        return value
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)
