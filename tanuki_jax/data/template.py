"""Jinja chat templates as transformers runs them, with the origin of every character of what they write.

Filters, tags, functions and options are those that transformers' `apply_chat_template` offers (its `_compile_jinja_template`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, NoReturn

from tanuki_jax.data import traced
from tanuki_jax.data.traced import Traced
from tanuki_jax.errors import UserError

if TYPE_CHECKING:  # jinja2 is imported where it is needed
    import jinja2
    from jinja2 import nodes
    from jinja2.compiler import Frame
    from jinja2.parser import Parser
    from jinja2.runtime import Context

BLOCK_NUMBERS = itertools.count(1)  # a number for each {% generation %} block that is run
# Jinja's filters that only cut, choose or replace, so that the parts of a traced text keep their origin.
ORIGIN_KEEPING = frozenset(
    ("trim", "string", "first", "last", "default", "d", "replace", "reverse", "min", "max", "random", "attr")
)


def render(source: str, values: Mapping[str, object]) -> Traced:
    """The text that the template writes for `values`; a template that refuses them, or cannot be run, is a UserError."""
    from jinja2.exceptions import TemplateError

    template = compile_template(source)
    try:
        return traced.join((template.render(**values),))
    except Refusal as error:
        raise UserError(f"the chat template refuses this conversation: {error}") from error
    except (TemplateError, RecursionError, OverflowError) as error:
        raise UserError(f"chat_template: {error}; it cannot be run on this conversation") from error
    except Exception as error:  # a template is a program of its own
        raise UserError(f"chat_template: {error} ({type(error).__name__}); it cannot be run on this conversation") from error


class Refusal(Exception):
    """What a template raises with raise_exception."""


@functools.lru_cache(maxsize=32)
def mentions(source: str) -> frozenset[str]:
    """Every name, attribute and string constant of a template; the fields of a message that it may read are among them."""
    from jinja2 import nodes

    tree = _environment().parse(source)
    names = {node.name for node in tree.find_all(nodes.Name)} | {node.attr for node in tree.find_all(nodes.Getattr)}
    return frozenset(names | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)})


@functools.lru_cache(maxsize=32)
def strings(source: str) -> frozenset[str]:
    """The string constants of a template, without those that name a key (`message['role']`)."""
    from jinja2 import nodes

    tree = _environment().parse(source)
    keys = {id(node.arg) for node in tree.find_all(nodes.Getitem)}
    return frozenset(node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str) and id(node) not in keys)


@functools.lru_cache(maxsize=32)
def compile_template(source: str) -> jinja2.Template:
    """The compiled template."""
    from jinja2.exceptions import TemplateSyntaxError

    if not source:
        raise UserError(
            "tokenizer_config.json has no chat_template; add one, or train the tokenizer with `tanuki tokenizer train`"
        )
    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise UserError(f"chat_template: line {error.lineno}: {error.message}; mend it in the tokenizer's directory") from error


@functools.cache
def _environment() -> jinja2.Environment:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nativetypes import NativeCodeGenerator
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generator(NativeCodeGenerator):
        """Writes values as they are, without str() around them; `~` joins them as output is joined."""

        def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
            self.write("environment.concat((")
            for argument in node.nodes:
                self.visit(argument, frame)
                self.write(", ")
            self.write("))")

    class Generation(Extension):
        """transformers' {% generation %}, which marks the text of the assistant."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> Traced:
            text = traced.join((caller(),))
            number = next(BLOCK_NUMBERS)
            return Traced(text, (run._replace(generated=number) for run in text._runs))

    class Environment(ImmutableSandboxedEnvironment):
        """Jinja's sandbox over traced text."""

        code_generator_class = Generator
        intercepted_binops = frozenset(["%"])
        concat = staticmethod(traced.join)

        def getattr(self, obj: object, attribute: str) -> object:
            # A method of the template's own text ('\n'.join, '...'.format) has to trace its arguments.
            return super().getattr(Traced(obj) if type(obj) is str else obj, attribute)

        def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
            return traced.apply(functools.partial(super().call_binop, context, operator), (left, right))

        def wrap_str_format(self, value: object) -> Callable[..., str] | None:
            form = super().wrap_str_format(value)
            if form is None:
                return None
            return lambda *values, **named: traced.apply(lambda *v, **n: str.__str__(form(*v, **n)), values, named)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters = {name: _trace_filter(filter, name in ORIGIN_KEEPING) for name, filter in environment.filters.items()}
    environment.filters["join"] = _join_filter()
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _trace_filter(filter: Callable[..., object], keeps: bool) -> Callable[..., object]:
    """A filter of Jinja's; unless it keeps the origin of each character, its result belongs to the texts it was made from."""

    @functools.wraps(filter)  # Jinja marks filters that take the environment or the context with attributes
    def apply(*arguments: object, **named: object) -> object:
        result = filter(*arguments, **named)
        if keeps and isinstance(result, Traced):
            return result
        return traced.trace_result(result, filter, arguments, named)

    return apply


def _join_filter() -> Callable[..., object]:
    from jinja2.filters import make_attrgetter, pass_environment

    @pass_environment
    def join(
        environment: jinja2.Environment, value: Iterable[object], d: str = "", attribute: str | int | None = None
    ) -> Traced:
        items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
        return traced.join(items, str(d))

    return join


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> Traced:
    return traced.to_json(value, sort_keys, ensure_ascii, indent, separators)


def _raise(message: str) -> NoReturn:
    raise Refusal(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
