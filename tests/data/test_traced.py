import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tanuki_jax.data import template, traced
from tanuki_jax.data.traced import Traced

TEXT = st.text("ab </>\n\t狸", max_size=12)
SOURCE = (0, "content")


def origins(text):
    """For each character the offset in its source, or None where the template wrote it."""
    return [
        None if run.source is None else run.offset if run.offset is None else run.offset + i
        for run in traced.runs_of(text)
        for i in range(run.length)
    ]


METHODS = {
    "strip": lambda s: [s.strip(), s.strip("a ")],
    "lstrip and rstrip": lambda s: [s.lstrip(), s.rstrip(), s.lstrip("\n"), s.rstrip("b")],
    "split": lambda s: [*s.split("a"), *s.split(), *s.split("</"), *s.split("a", 1)],
    "rsplit": lambda s: [*s.rsplit("a", 1), *s.rsplit(None, 1)],
    "splitlines": lambda s: [*s.splitlines(), *s.splitlines(True)],
    "partition": lambda s: [*s.partition("a"), *s.rpartition("a")],
    "affixes": lambda s: [s.removeprefix("a"), s.removesuffix("\n")],
    "slices": lambda s: [s[1:], s[:-1], s[::2], s[::-1], *s],
    "sums": lambda s: ["x" + s, s + "x", s + s, s * 2],
    "replace": lambda s: [s.replace("a", "xyz"), s.replace("</", ""), s.replace("a", "b", 1)],
    "join": lambda s: [s.join("xy"), s.join([])],
}


@given(TEXT)
def test_methods_give_what_str_gives_and_each_character_keeps_its_origin(text):
    for name, method in METHODS.items():
        for plain, result in zip(method(text), method(Traced.of(text, SOURCE)), strict=True):
            assert str.__str__(result) == plain and isinstance(result, Traced), name
            assert len(origins(result)) == len(plain), name
            for character, origin in zip(plain, origins(result), strict=True):
                assert origin is None or text[origin] == character, name
    assert None not in origins(Traced.of(text, SOURCE).strip())


@settings(max_examples=40)
@given(TEXT)
def test_what_str_makes_anew_belongs_to_its_text_as_a_whole(text):
    whole = Traced.of("a" + text, SOURCE)
    for derived in (whole.upper(), whole.title(), whole.swapcase()):
        assert {run.source for run in traced.runs_of(derived)} <= {SOURCE}


@settings(max_examples=40)
@given(TEXT, TEXT)
def test_what_a_format_writes_around_a_text_is_its_own(text, other):
    a, b = Traced.of(text, SOURCE), Traced.of(other, (1, "content"))
    for formatted in (traced.apply(str.__mod__, ("<%s|%s>", (a, b))), Traced("<{}|{}>").format(a, b)):
        assert formatted == f"<{text}|{other}>"
        parts = [(formatted[slice(*span)], run.source) for span, run in traced.spans_of(formatted) if run.length]
        assert parts == [p for p in (("<", None), (text, SOURCE), ("|", None), (other, (1, "content")), (">", None)) if p[0]]


def test_methods_raise_what_str_raises():
    text = Traced.of("ab", SOURCE)
    for wrong in (lambda: text[5], lambda: text.split(""), lambda: text + 1, lambda: text["a"]):
        with pytest.raises((IndexError, ValueError, TypeError)):
            wrong()


LEAVES = TEXT | st.integers() | st.booleans() | st.none()
VALUES = st.recursive(LEAVES, lambda v: st.lists(v) | st.dictionaries(TEXT, v), max_leaves=20)


@settings(max_examples=50)
@given(VALUES, st.booleans(), st.sampled_from([None, 2]))
def test_json_is_json_and_its_strings_are_traced_to_where_they_stand(value, ascii_only, indent):
    written = traced.to_json(traced.trace(value, ("tools",)), ensure_ascii=ascii_only, indent=indent)
    assert str.__str__(written) == json.dumps(value, ensure_ascii=ascii_only, indent=indent)


ECHO = {
    "filters": "{{ m | upper }}{{ m | trim }}{{ m | replace('a', 'b') }}{{ [m, 'x'] | join('-') }}{{ m | tojson }}",
    "more filters": "{{ m | indent }}{{ m | e }}{{ m | wordwrap(3) }}"
    "{{ '%s' | format(m) }}{{ m | first }}{{ m | list | last }}",
    "operators": "{{ m ~ 1 ~ 'x' }}{{ 'x' + m }}{{ '%s %d' % (m, 3) }}{{ '{}!'.format(m) }}{{ '+'.join([m, m]) }}{{ m[::-1] }}",
    "iterators": "{{ ['q', 'x'] | map('upper') | first }}{{ [m, 'x'] | map('trim') | first }}"
    "{{ ([{'c': m}, {'c': 'x'}] | selectattr('c') | first).c }}",  # a filter that reads one is called once
    "macros and blocks": "{% macro f(x) %}<{{ x }}>{% endmacro %}{% set y %}{{ f(m) }}{% endset %}{{ y.split('<')[1] }}",
    "loops": "{% for c in m %}{{ c }}{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}"
    "{% generation %}{{ m }}{% endgeneration %}",
}


@pytest.mark.parametrize("name", ECHO)
def test_templates_write_the_same_with_and_without_traces(name):
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    plain.filters["tojson"] = lambda x: json.dumps(x, ensure_ascii=False)
    source = ECHO[name].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    for text in ("ab a\n狸", "a<b> </think>", " "):
        written = template.render(ECHO[name], {"m": Traced.of(text, SOURCE)})
        assert str.__str__(written) == plain.from_string(source).render(m=text)
        literal = "".join(
            str.__str__(written)[a:b] for (a, b), run in traced.spans_of(written) if run.source is None
        )  # what the template is seen to have written itself
        assert not set(literal) & set("狸think")
