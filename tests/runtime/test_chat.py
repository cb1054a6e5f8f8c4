"""Rendering is held to transformers' own, on templates written after those of models in wide use."""

from __future__ import annotations

from typing import Any

import pytest

from medcompile.errors import InputError
from medcompile.runtime.chat import ChatTemplate

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("conversation roles must alternate user and assistant") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- endif %}
{%- endfor %}"""

TOOLS = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{{- "Today: " + date_string + "\\n" }}
{%- if tools is not none %}
    {{- "<tools>\\n" }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- "\\n" }}{%- endfor %}
    {{- "</tools>" + tools[0] | tojson }}
{%- endif %}
{%- for message in messages if message.role != "tool" %}
    {%- if message.content is string %}{% set content = message.content %}{% else %}{% set content = "" %}
        {%- for part in message.content %}{%- if part.type == "text" %}{% set content = part.text %}{{ part.text }}
        {%- else %}{% continue %}{%- endif %}{%- endfor %}{%- endif %}
    {%- if message.role == "assistant" %}
        {% generation %}
        {{- "<a>" + (message.reasoning_content or "") + content + "</a>" }}
        {%- for call in message.tool_calls or [] %}{{- call.function.arguments | tojson }}{%- endfor %}
        {% endgeneration %}
    {%- else %}
        {{- "<" + message.role + ">" + content + "\\n" }}
    {%- endif %}
{%- endfor %}
{%- set extra = dict(a=1, **dict.fromkeys(["b"], 2)) %}
{{- extra | tojson(sort_keys=true) }}{{ "think" if enable_thinking else "no" }}"""

TURNS = [
    {"role": "user", "content": "  What causes <b>gout</b> & \u201cpodagra\u201d?\n"},
    {"role": "assistant", "content": " Urate crystals. \n"},
    {"role": "user", "content": "Treatment?"},
]
WITH_SYSTEM = [{"role": "system", "content": "You are a nurse."}, *TURNS]
TOOL = {
    "type": "function",
    "function": {"name": "dose", "description": "mg \u00b5g <x>", "parameters": {"b": [1, None]}},
}
CALLS = [
    {"role": "user", "content": [{"type": "text", "text": "Dose?"}, {"type": "image", "image": object()}]},
    {
        "role": "assistant",
        "content": "",
        "reasoning": "look it up",
        "tool_calls": [{"function": {"name": "dose", "arguments": {"drug": "allopurinol", "\u00b5": True}}}],
    },
    {"role": "tool", "content": "100 mg"},
]


def theirs(template: str, messages: list[dict[str, Any]], **given: Any) -> str:
    found = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template(
        [messages], chat_template=template, **given, **NAMES
    )
    return str(found[0][0])


@pytest.mark.parametrize("template", [CHATML, ZEPHYR, MISTRAL], ids=["chatml", "zephyr", "mistral"])
@pytest.mark.parametrize("messages", [TURNS[:1], TURNS, WITH_SYSTEM], ids=["one", "turns", "system"])
@pytest.mark.parametrize("answer_next", [True, False])
def test_conversations_render_as_transformers_renders_them(
    template: str, messages: list[dict[str, Any]], answer_next: bool
) -> None:
    ours = ChatTemplate(template, NAMES).render(messages, add_generation_prompt=answer_next)
    assert ours == theirs(template, messages, add_generation_prompt=answer_next)


@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": True, "date_string": "1 Jan 2024"}])
def test_tools_parts_reasoning_and_a_templates_own_variables_render_as_in_transformers(
    tools: list[dict[str, Any]] | None, variables: dict[str, Any]
) -> None:
    ours = ChatTemplate(TOOLS, NAMES).render(CALLS, tools=tools, variables=variables)
    assert ours == theirs(TOOLS, CALLS, tools=tools, add_generation_prompt=True, **variables)
    assert "look it up" in ours
    assert ("\u00b5g <x>" in ours) == (tools is not None)


def test_a_whole_tokenizer_of_transformers_gives_the_same_text() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), chat_template=ZEPHYR, **NAMES
    )
    expected = tokenizer.apply_chat_template(WITH_SYSTEM, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(ZEPHYR, NAMES).render(WITH_SYSTEM) == expected


def test_a_template_that_refuses_the_conversation_says_why() -> None:
    with pytest.raises(InputError, match="must alternate"):
        ChatTemplate(MISTRAL, NAMES).render([TURNS[0], TURNS[2]])


def test_a_template_that_is_none_names_the_line() -> None:
    with pytest.raises(InputError, match="line 2"):
        ChatTemplate("fine\n{% for %}", NAMES)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ dict.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.items() }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_a_template_cannot_reach_python_or_change_what_it_is_given(attack: str) -> None:
    template = ChatTemplate(attack, NAMES)
    with pytest.raises(InputError):
        template.render(TURNS)


@pytest.mark.parametrize("messages", [[], [{"content": "no role"}], ["text"]])
def test_what_is_no_conversation_is_refused(messages: Any) -> None:
    with pytest.raises(InputError, match="role"):
        ChatTemplate(CHATML, NAMES).render(messages)
