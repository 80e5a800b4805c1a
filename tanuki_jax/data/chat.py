"""Encodes conversations as ids and an assistant mask with any Jinja chat template; Tanuki's own is the default.

The template is rendered with the real contents, and every character of its output is traced to the message it came from.
So the ids are those of transformers' `apply_chat_template`, text of a message never becomes a control token, and the mask
covers what the assistant says.
"""

from __future__ import annotations

from tanuki_jax.data import template, traced
from tanuki_jax.data.conversation import Messages, RowFields, check_messages, pair_messages
from tanuki_jax.data.rendering import (
    LISTS,
    Arguments,
    check_all_came_out,
    leaves,
    plain_messages,
    quoted_spans,
    render_chat,
    template_of,
    texts_of,
)
from tanuki_jax.data.tokenizer import Span, Tokenizer
from tanuki_jax.data.turns import is_trained, trained_spans, turn_format
from tanuki_jax.errors import UserError

SYSTEM = "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。"
TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}" + SYSTEM + "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\n\n### 指示:\n' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\n\n### 応答:\n' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### 応答:\n' }}{% endif %}"
)
VERSION = 3  # of the encoding of conversations; stores of dialogues and pairs of another version are prepared again


def encode_chat(
    tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = False, arguments: Arguments | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and a mask: 1 for each id that the assistant says, else 0.

    The ids are those of transformers' apply_chat_template, except that no text of a message becomes a control token.  The
    mask covers every token that holds a character of the assistant's content, reasoning or tool calls, what the template
    writes between them, and the token that ends the turn; or what `{% generation %}` marks, where a template has it.  It
    leaves out assistant messages with `weight` 0, as in OpenAI's format.  A message that the template leaves out is an error.
    """
    rendered = render_chat(tokenizer, messages, add_generation_prompt, arguments)
    check_all_came_out(rendered, messages, arguments or {}, template_of(tokenizer, arguments))
    turn = turn_format(tokenizer)
    ids, spans = tokenizer.encode_rendered(
        str.__str__(rendered),
        quoted_spans(rendered),
        frozenset(turn.stop_ids),
    )
    added = [(span, token) for token, span in zip(ids, spans, strict=True) if token in tokenizer.added_ids]
    trained = trained_spans(tokenizer, rendered, messages, turn, added)
    mask = [0] * len(ids)
    at = 0
    for i, (start, stop) in enumerate(spans):
        while at < len(trained) and trained[at][1] <= start:
            at += 1
        mask[i] = int(at < len(trained) and stop > trained[at][0] and stop > start)
    return ids, mask


def render_prompt(tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool) -> tuple[str, list[Span]]:
    """A conversation as its template writes it, and where its messages spell control tokens.

    Without add_generation_prompt it ends with the content of the last message, for the model to continue.
    """
    rendered = render_chat(tokenizer, messages, add_generation_prompt, None)
    check_all_came_out(rendered, messages, {}, tokenizer.chat_template)
    text = str.__str__(rendered)
    if not add_generation_prompt:
        last = (len(messages) - 1, "content")
        spans = [span for span, run in traced.spans_of(rendered) if run.source and run.source[:2] == last]
        text = text[: max((stop for _, stop in spans), default=0)]
    return text, tokenizer.quoted_controls(text, quoted_spans(rendered), frozenset(stop_ids(tokenizer)))


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an answer, ascending: the tokenizer's eos, what the chat template writes at the end of the
    assistant's turn, and the eos_token_id of generation_config.json."""
    if tokenizer.chat_template:
        return turn_format(tokenizer).stop_ids
    return tuple(sorted({tokenizer.eos, *tokenizer.generation_eos}))


def render(
    messages: Messages,
    source: str = TEMPLATE,
    bos_token: str = "",
    eos_token: str = "",
    add_generation_prompt: bool = False,
) -> str:
    """A conversation as text; by default in Tanuki's template without special tokens: what a tokenizer should learn from."""
    check_messages(messages)
    values = {"bos_token": bos_token, "eos_token": eos_token, "add_generation_prompt": add_generation_prompt}
    return str.__str__(
        template.render(source, {"messages": plain_messages(messages), "tools": None, "documents": None, **values})
    )


def encode_dialogue(
    tokenizer: Tokenizer, messages: Messages, arguments: Arguments | None = None
) -> tuple[list[int], list[int]]:
    """A training conversation; one without an assistant turn, with an empty one, or that does not end, is an error."""
    check_messages(messages)
    answers = [m for m in messages if m["role"] == "assistant" and is_trained(m)]
    for message in answers:
        if not texts_of(message.get("content")).strip() and not message.get("tool_calls"):
            raise UserError(
                "conversation with an empty answer of the assistant: it would learn to say nothing; "
                "remove the row, or give the message weight 0"
            )
    ids, mask = encode_chat(tokenizer, messages, arguments=arguments)
    if not answers or not any(mask):
        raise UserError("conversation without an assistant turn: there is nothing to learn from it")
    last = max(i for i, trained in enumerate(mask) if trained)
    if messages[-1] is answers[-1] and ids[last] not in tokenizer.added_ids:
        raise UserError(
            f"chat_template writes no special token after the last answer ({tokenizer.eos_token} was expected): "
            "the model would not learn to stop; add eos_token to the template"
        )
    return ids, mask


def encode_pair(tokenizer: Tokenizer, row: RowFields) -> list[tuple[list[int], list[int]]]:
    """The chosen and the rejected conversation of a preference row; the mask covers only the answers that differ."""
    return [encode_dialogue(tokenizer, side, template_arguments(row)) for side in pair_messages(row)]


def template_arguments(row: RowFields) -> Arguments:
    """The arguments that a row gives the chat template: `tools`, `documents`, and all of `chat_template_kwargs`."""
    lists = {name: row[name] for name in LISTS if row.get(name)}
    return {**lists, **(row.get("chat_template_kwargs") or {})}


def text_of(fields: RowFields) -> str:
    """The conversation of a dialogue row, or both of a pair, as plain text."""
    sides = [fields["messages"]] if "messages" in fields else pair_messages(fields)
    return "\n".join(_text_of(messages) for messages in sides)


def _text_of(messages: Messages) -> str:
    check_messages(messages)
    if all(m["role"] in ("system", "user", "assistant") and isinstance(m.get("content"), str) for m in messages):
        return render(messages)
    return "\n\n".join(text for message in messages for name, text in leaves(message) if name[-1] != "role")
