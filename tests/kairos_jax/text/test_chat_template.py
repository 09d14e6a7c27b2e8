"""Chat templates render as they do with transformers: the expected texts are those of 5.24."""

import contextlib
import re

import pytest
import tokenizers
from tokenizers import models

from kairos_jax.text import chat_template
from kairos_jax.text.tokenizer import Tokenizer

HI = [{"role": "user", "content": "hi"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " <é'> "},
    {"role": "assistant", "content": "Well, I "},
]
ALL = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
TRIMMED = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}|\n{% endfor %}"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def made(template: str | None = None, **parts) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer(models.BPE()), chat_template=template, **parts)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # Blocks take the newline behind them and the spaces before them.
        ("a\n  {% if true %}\n  b\n  {% endif %}\nc", "a\n  b\nc"),
        ("{# note #}\nc\n", "c"),
        ("{% for i in range(3) %}{% if i %}{% continue %}{% endif %}{{ i }}{% endfor %}", "0"),
        ("{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{{ missing }}|{{ messages[0].missing }}|{{ missing is defined }}", "||False"),
        ("{{ tools is none }} {{ documents is none }} {{ bos_token is none }}", "True True False"),
        ("{{ {'b': '<é\\'>', 'a': [1]} | tojson }}", '{"b": "<é\'>", "a": [1]}'),
        ("{{ {'b': 'é', 'a': 1} | tojson(true, sort_keys=true) }}", '{"a": 1, "b": "\\u00e9"}'),
        ("{{ [1, {}] | tojson(indent=2) }}", "[\n  1,\n  {}\n]"),
        ("{{ {'a': [1, 2]} | tojson(separators=(',', ':')) }}", '{"a":[1,2]}'),
        ("{% generation %}\n{{ 1 }}{% set x = 1 %}{% endgeneration %}|{{ x }}", "1|"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}{{ dict(a=1) }}", "2{'a': 1}"),
    ],
)  # fmt: skip
def test_the_environment_is_that_of_transformers(source, expected):
    assert made(source).render_chat(HI) == expected


def test_the_present_time_is_the_clocks():
    text = made("{{ strftime_now('%Y-%m-%d %%') }}").render_chat(HI)
    assert text.endswith(" %")
    year, month, day = text.removesuffix(" %").split("-")
    assert int(year) >= 2025
    assert (len(month), len(day)) == (2, 2)


def test_a_template_finds_what_it_is_given():
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<p>", "image_token": "<i>"}
    source = (
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ image_token }}{{ add_generation_prompt }}"
        "{{ tools | tojson }}{{ documents | tojson }}{{ enable_thinking }}"
    )
    text = made(source, special_tokens=tokens).render_chat(
        HI,
        False,
        tools=TOOLS,
        documents=[{"title": "t"}],
        template_kwargs={"enable_thinking": False, "eos_token": "<end>"},
    )
    shown = '[{"type": "function", "function": {"name": "f", "parameters": {}}}]'
    assert text == f'<s><end><p><i>False{shown}[{{"title": "t"}}]False'


def test_messages_are_as_templates_expect_them():
    source = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}"
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "assistant", "content": "x", "reasoning": "so"},
    ]
    assert made(source).render_chat(messages).splitlines() == [
        '{"role": "assistant", "tool_calls": [{"id": "1"}]}',
        '{"thinking": "so", "role": "assistant", "content": "x", "reasoning": "so", '
        '"reasoning_content": "so"}',
    ]
    assert messages[0]["content"] is None, "the caller's messages are left alone"


@pytest.mark.parametrize(
    ("source", "role"),
    [(ALL, "system"), (ALL + "{# developer #}", "developer")],
)
def test_developers_are_systems_where_a_template_does_not_know_them(source, role):
    text = made(source).render_chat([{"role": "developer", "content": "x"}])
    assert text == f"[{role}] x\n"


# Continuing the final message.


def continued(source: str, messages=TALK, **more) -> str:
    return made(source).render_chat(messages, False, continue_final_message=True, **more)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (ALL + "tail", "[system] Be brief.\n[user]  <é'> \n[assistant] Well, I "),
        (TRIMMED, "[system] Be brief.|\n[user] <é'>|\n[assistant] Well, I"),
    ],
)
def test_a_final_message_is_cut_after_its_content(source, expected):
    assert continued(source) == expected


def test_the_last_text_of_parts_is_continued():
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "Two "}, {"type": "image"}]
    source = "{% for p in messages[0].content %}{{ p.text }}.{% endfor %}"
    assert continued(source, [{"role": "assistant", "content": parts}]) == "One.Two "


@pytest.mark.parametrize(
    ("source", "messages", "words"),
    [
        (ALL, [{"role": "assistant"}], "cannot continue the final message, which has no text"),
        (ALL, [{"role": "assistant", "content": [{}]}], "cannot continue the final message"),
        ("{{ messages | tojson }}", TALK, "does not read the content of messages"),
        ("{{ messages[0].content }}", TALK, "does not show the final message as it is"),
        (ALL.replace("m.content", "m.content | upper"), TALK, "does not show the final message"),
    ],
)
def test_what_cannot_be_continued_is_refused(source, messages, words):
    with pytest.raises(ValueError, match=f"the model's chat template {words}"):
        continued(source, messages)


def test_a_prompt_does_not_both_continue_and_begin_an_answer():
    with pytest.raises(ValueError, match="needs add_generation_prompt to be false"):
        made(ALL).render_chat(TALK, continue_final_message=True)
    with pytest.raises(ValueError, match="needs add_generation_prompt to be false"):
        continued(ALL, template_kwargs={"add_generation_prompt": True})


# Which template.


def test_a_model_with_several_templates_is_asked_by_name():
    several = made("of all", named_templates={"tool_use": "with tools", "rag": "of documents"})
    assert several.render_chat(HI) == "of all"
    assert several.render_chat(HI, tools=TOOLS) == "with tools"
    assert several.render_chat(HI, chat_template="rag", tools=TOOLS) == "of documents"
    assert several.render_chat(HI, chat_template="default", tools=TOOLS) == "of all"
    assert several.render_chat(HI, chat_template="mine {{ messages[0].content }}") == "mine hi"
    assert made("one").render_chat(HI, tools=TOOLS) == "one"
    assert made("one").render_chat(HI, chat_template="mine") == "mine"
    assert made(None).render_chat(HI, chat_template="mine") == "mine"


@pytest.mark.parametrize(
    ("tokenizer", "asked", "words"),
    [
        (made(None), {}, "the model has no chat template; send text or token ids"),
        (
            made(None, named_templates={"b": "", "a": ""}),
            {},
            "the model has no default chat template; name one of these: a, b",
        ),
        (made(""), {"messages": []}, "a chat needs at least 1 message"),
        (made(""), {"template_kwargs": {"messages": []}}, "template_kwargs can't hold messages"),
        (
            made("{{ 1 // 0 }}", named_templates={"a": "\n{{ 1 // 0 }}"}),
            {"chat_template": "a"},
            "the model's chat template 'a' failed at line 2: ZeroDivisionError: ",
        ),
        (made(""), {"chat_template": "{{ x.y }}"}, "the given chat template failed at line 1: Und"),
        (made("{% if %}"), {}, "the model's chat template can't be compiled: line 1: Expected an"),
        (
            made("{{ messages[0] | tojson }}"),
            {"messages": [{"role": object()}]},
            "the model's chat template can't be given the messages: a value is of no JSON",
        ),
    ],
)
def test_errors_name_the_template(tokenizer, asked, words):
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        tokenizer.render_chat(**({"messages": HI} | asked))


# Faults.


def deep(levels: int) -> list:
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused the messages: roles must alter"),
        ("{{ raise_exception('x' * 1000) }}", "refused the messages: xxx"),
        ("{{ 1 // 0 }}", "failed at line 1: ZeroDivisionError"),
        ("\n\n{{ messages[0].a.b }}", "failed at line 3: UndefinedError: 'dict object' has no"),
        ("{{ missing + 'x' }}", "failed at line 1: UndefinedError: 'missing' is undefined"),
        ("{{ range(10**9) }}", "failed at line 1: OverflowError: Range too big"),
        ("{{ messages.append(1) }}", "failed at line 1: SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "failed at line 1: SecurityError"),
        ("{{ messages + 1 }}", "failed at line 1: TypeError"),
        ("{{ '%d' % 'x' }}", "failed at line 1: TypeError"),
        ("{{ {}.popitem }}{{ messages['a'] }}{{ messages[7].x }}", "failed at line 1: UndefinedEr"),
        ("{% include 'other' %}", "failed at line 1: TypeError: no loader"),
        ("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "failed at line 1: Recursion"),
        ("{{ '\\ud800' }}", "failed: UnicodeEncodeError"),
        ("{% for i in range(40) %}{{ 'x' * 1000000 }}{% endfor %}", "makes a text of more than"),
        ("{% if %}", "can't be compiled: line 1: Expected an expression"),
        ("\n{{ 'a' | unknown }}", "can't be compiled: line 2: No filter named 'unknown'"),
        ("{% generation %}", "can't be compiled: line 1: Unexpected end of template"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "can't be compiled: RecursionError"),
        ("{% generation %}{% break %}{% endgeneration %}", "can't be compiled: SyntaxError: 'bre"),
    ],
)  # fmt: skip
def test_any_fault_is_said(source, words):
    with pytest.raises(chat_template.Fault) as error:
        chat_template.render(source, HI, {})
    assert str(error.value).startswith(words)
    assert len(str(error.value)) < 600


def test_what_a_conversation_holds_cannot_break_a_template():
    for levels in (100_000, *range(940, 1000, 6)):
        with contextlib.suppress(ValueError):
            made(ALL).render_chat([{"role": "user", "content": deep(levels)}])
    with pytest.raises(ValueError, match="can't be given the messages"):
        made(ALL).render_chat([{"role": "user", "content": deep(100_000)}])
    text = made(ALL).render_chat([{"role": "user", "content": deep(200)}])
    assert text.count("[") == 202
    with pytest.raises(ValueError, match="UnicodeEncodeError"):
        made(ALL).render_chat([{"role": "user", "content": "\ud800"}])
