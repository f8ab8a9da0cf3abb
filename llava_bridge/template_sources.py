"""Jinja sources of the dialogue templates, for the environment that transformers renders chat templates in."""

from __future__ import annotations

FLATTEN = r"""
{%- set ns = namespace(images=0, messages=[], text='', leading=true) %}
{%- for message in messages %}
    {%- if message['content'] is string %}
        {%- set ns.images = ns.images + message['content'].count('<image>') %}
    {%- elif message['content'] %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {%- set ns.images = ns.images + 1 %}
            {%- elif part['type'] != 'text' %}
                {{- raise_exception('content parts must be of type text or image, got ' + part['type']) }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set ns.text = message['content'] %}
    {%- if message['content'] is not string and message['content'] %}
        {%- set ns.text = '' %}
        {%- set ns.leading = true %}
        {%- for part in message['content'] %}
            {%- set piece = '<image>' if part['type'] == 'image' else part['text'] %}
            {%- set ns.text = ns.text + ('\n' if ns.leading and ns.text and piece else '') + piece %}
            {%- set ns.leading = ns.leading and (part['type'] == 'image' or not piece) %}
        {%- endfor %}
        {%- if ns.images == 1 and message['content'] | selectattr('type', 'equalto', 'image') | list %}
            {%- set texts = message['content'] | selectattr('type', 'equalto', 'text') %}
            {%- set ns.text = ('<image>\n' + texts | map(attribute='text') | join | trim) | trim %}
        {%- endif %}
    {%- endif %}
    {%- set ns.messages = ns.messages + [dict(message, content=ns.text)] %}
{%- endfor %}"""
"""Makes every message's content a string in `ns.messages`; typed parts follow the rule of `templates.place_images`."""

PLAIN = r"""
{%- for message in ns.messages %}
    {%- if message['role'] == 'user' %}
        {{- '<image>' * message['content'].count('<image>') }}
    {%- elif message['role'] == 'assistant' %}
        {%- generation %}
        {{- message['content'] + '\n' }}
        {%- endgeneration %}
    {%- else %}
        {{- raise_exception('roles must be user or assistant, got ' + message['role']) }}
    {%- endif %}
{%- endfor %}
"""
"""LLaVA v1.2 `train.py: preprocess_plain`: placeholders, caption, newline; what the user says is dropped."""

VICUNA = r"""
{%- set system = SYSTEM %}
{%- if ns.messages[0]['role'] == 'system' %}
    {%- set system = ns.messages[0]['content'] %}
    {%- set ns.messages = ns.messages[1:] %}
{%- endif %}
{{- system + ' ' if system else '' }}
{%- for message in ns.messages %}
    {%- if message['role'] == 'user' %}
        {{- 'USER: ' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ASSISTANT:' }}
        {%- generation %}
        {{- (' ' + message['content'] if message['content'] else '') + EOS }}
        {%- endgeneration %}
    {%- else %}
        {{- raise_exception('roles must be user or assistant after the system message, got ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{{- ' ASSISTANT:' if add_generation_prompt else '' }}
"""
"""`conv_vicuna_v1` of LLaVA v1.2 `conversation.py`; SYSTEM and EOS stand for string literals."""

FIXED_DATE = "{%- set date_string = '26 Jul 2024' %}\n"
"""Llama 3.2's own date for renderers without a clock, so that a sample is the same on every day."""

CHAT_SYSTEM = r"""
{%- if ns.messages[0]['role'] != 'system' %}
    {%- set ns.messages = [{'role': 'system', 'content': SYSTEM}] + ns.messages %}
{%- endif %}"""
"""Adds a system message; SYSTEM stands for a string literal."""
