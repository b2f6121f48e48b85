"""Jinja's sandbox for chat templates from strangers, with bounds on work and output.

Jinja's ImmutableSandboxedEnvironment keeps templates from Python's internals, but not from looping
or growing without end. So every loop turn, macro call, printed value, filter and concatenation
spends from a budget per rendering: a hostile template ends soon, with the same error on every
machine, which a time limit (and a process to enforce it) could not promise.
"""

import contextlib
import contextvars
import dataclasses
import datetime
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

# About one per character; a loop turn costs _TURN. A million tokens of conversation cost about 20
# million.
_BUDGET = 100_000_000
_TURN = 1_000
_MAX_SOURCE = 1_000_000
_MAX_RANGE = 100_000
_MAX_WIDTH = 1_000
_MAX_INTEGER_BITS = 256
# Of no use in a chat, and able to make long strings or lists from short templates.
_REMOVED_FILTERS = (
    *("center", "format", "pprint", "random", "sum", "urlize", "wordwrap", "xmlattr"),
    *("batch", "slice", "filesizeformat"),
)
_REMOVED_METHODS = {
    *("center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"),
    *("translate", "encode", "to_bytes"),
}


@dataclasses.dataclass
class Meter:
    """One rendering: the budget left, and the number of generation blocks met."""

    left: int = _BUDGET
    num_generations: int = 0


_meter: contextvars.ContextVar[Meter | None] = contextvars.ContextVar("meter", default=None)


class TemplateError(ValueError):
    """A chat template is invalid or hostile, or refuses its input."""


class Span(str):
    """Text rendered by a `{% generation %}` block."""


@contextlib.contextmanager
def metered() -> Iterator[Meter]:
    """The meter of one rendering."""
    meter = Meter()
    token = _meter.set(meter)
    try:
        yield meter
    finally:
        _meter.reset(token)


def spend(amount: int) -> None:
    meter = _meter.get()
    if meter is not None:
        meter.left -= amount
        if meter.left < 0:
            raise TemplateError(
                "the template does too much work: its loops or its output are too long"
            )


def make_environment() -> "Environment":
    """The environment chat templates expect (as in transformers), with bounds."""
    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=_Missing,
        finalize=_printed,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    for name in _REMOVED_FILTERS:
        del environment.filters[name]
    environment.filters = {name: _paying(name, f) for name, f in environment.filters.items()}
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    environment.globals["range"] = _bounded_range
    return environment


class _Missing(jinja2.Undefined):
    """Printed as nothing, unless it is undefined because the sandbox hides it."""

    def __str__(self) -> str:
        if self._undefined_exception is jinja2.exceptions.SecurityError:
            self._fail_with_undefined_error()
        return super().__str__()


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Charges for operations; `has_generation` is set by `{% generation %}` blocks."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    has_generation = False

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > _MAX_SOURCE:
            raise TemplateError(f"the template has {len(source)} characters; {_MAX_SOURCE} at most")
        return _Metered().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "%" and isinstance(left, str | bytes)):
            raise TemplateError(f"the operator '{operator}' is not allowed in chat templates")
        if operator == "*":
            spend(_length(left) * _times(right) + _length(right) * _times(left))
        elif operator == "+":
            spend(_length(left) + _length(right))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > _MAX_INTEGER_BITS:
            raise TemplateError(f"the template computes integers over {_MAX_INTEGER_BITS} bits")
        return result

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if name in _REMOVED_METHODS:
            raise TemplateError(f"the method '{name}' is not allowed in chat templates")
        if isinstance(owner, str):
            _spend_on_text(name, owner, *args)
        return super().call(context, function, *args, **kwargs)

    turn = staticmethod(spend)  # at the start of every loop body and macro

    def concatenate(self, *values: Any) -> str:
        """The operator `~`."""
        return "".join([_printed(value) for value in values])

    def measured(self, value: Any) -> Any:
        """The left side of a comparison, which takes very long for lists that share parts."""
        _spend_on(value)
        return value


class _Metered(NodeTransformer):
    """Inserts calls of the environment's `turn`, `concatenate` and `measured`.

    As attributes of the environment they are out of a template's reach.
    """

    def _with_turn(self, node: Any) -> Any:
        self.generic_visit(node)
        data = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        call = _environment_call("turn", [nodes.Const(_TURN + data)], node.lineno)
        node.body.insert(0, nodes.ExprStmt(call, lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _with_turn

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _environment_call("concatenate", node.nodes, node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _environment_call("measured", [node.expr], node.lineno)
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        """Lists in place of tuples, which can take very long to hash."""
        self.generic_visit(node)
        return nodes.List(node.items, lineno=node.lineno) if node.ctx == "load" else node


def _environment_call(name: str, args: list[nodes.Expr], line: int) -> nodes.Call:
    method = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(method, args, [], None, None, lineno=line)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` around the assistant's text."""

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Any) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        self.environment.has_generation = True  # pyright: ignore[reportAttributeAccessIssue]
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body, lineno=line)

    def _mark(self, caller: Callable[[], str]) -> Span:
        if (meter := _meter.get()) is not None:
            meter.num_generations += 1
        return Span(caller())


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _times(value: Any) -> int:
    return max(value, 0) if isinstance(value, int) else 0


def _spend_on(value: Any) -> None:
    """Charges for every character and element, as often as it occurs."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.keys()
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value
        spend(64 + (len(value) if isinstance(value, str | list | tuple | dict) else 0))


def _spend_on_text(operation: str, text: Any, *args: Any) -> None:
    """Charges for a string method or a filter before it runs."""
    for value in (text, *args):
        _spend_on(value)
    if operation == "replace" and len(args) > 1 and isinstance(text, str):
        old, new = str(args[0]), str(args[1])
        spend((text.count(old) if old else len(text) + 1) * len(new))
    elif operation == "join":
        separator, parts = (args[0] if args else "", text)
        if isinstance(text, str) and args and not isinstance(args[0], str):
            separator, parts = text, args[0]
        spend(_length(parts) * _length(separator))


def _paying(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is charged first, with bounded `width` and `indent`."""

    @functools.wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        # Some filters take the context or the environment first.
        values = args[1:] if hasattr(function, "jinja_pass_arg") else args
        arguments = (*values[1:], *kwargs.values())
        if name == "indent" and any(_width(a) > _MAX_WIDTH for a in arguments):
            raise TemplateError(f"indent by more than {_MAX_WIDTH} characters")
        if values:
            _spend_on_text(name, values[0], *arguments)
            if name == "indent" and isinstance(values[0], str):
                spend(max(map(_width, arguments), default=4) * values[0].count("\n"))
        return function(*args, **kwargs)

    return paid


def _width(value: Any) -> int:
    return value if isinstance(value, int) else _length(value)


def _printed(value: Any) -> str:
    if not isinstance(value, str):
        _spend_on(value)
        value = str(value)
    spend(len(value) + 1)
    return value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not 0 <= _width(indent) <= 16:
        raise TemplateError(f"tojson(indent={indent!r:.40}); use 0 to 16, or as many characters")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _bounded_range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > _MAX_RANGE:
        raise TemplateError(f"range of {len(numbers)} numbers; {_MAX_RANGE} at most")
    return numbers


def _raise_exception(message: str) -> None:
    raise TemplateError(f"the template refuses its input: {message}")
