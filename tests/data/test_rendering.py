"""Chat templates that take forever, or all memory, are ended; those of usual models are rendered in this process."""

import json
import os
import time

import pytest

from rlhf_fast.data.encoding import Encoder
from rlhf_fast.data.reading import Row
from rlhf_fast.data.rendering import Renderer, is_tame
from rlhf_fast.errors import UserError
from rlhf_fast.models.tiny import CHAT_TEMPLATE, byte_tokenizer
from tests.data.chat import RETURNING, SPOKEN, TEMPLATES, THINKING

MESSAGES = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
GOOD = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
GROWING = [
    "{{ 'x' * 999999999 }}", "{{ 9**(9**9) }}", "{{ ('%0999999999d' % 1) }}", "{{ 'a' | center(999999999) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ range(99999) | list | string | replace('1', 'x' * 99999) }}", "{{ messages | tojson(indent=999999999) }}",
    "{% set n = namespace(x='ab') %}{% for c in messages[0]['content'] * 99 %}{% set n.x = n.x ~ n.x %}{% endfor %}",
]  # fmt: skip
# Not tame, although they end at once.
SUSPECT = [
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f('a') }}", "{% for i in range(3) %}x{% endfor %}", "{{ 'x' * 3 }}",
    "{{ 'a' | replace('a', 'b') }}", "{% set x = 'a' %}{% set x = x ~ x %}{{ x }}",
    "{% set n = namespace(l=[1]) %}{% for m in messages %}{% for c in n.l %}{% set n.l = n.l + [c] %}{% endfor %}"
    "{% endfor %}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ '{:>999999999}'.format(1) }}",
    "{% for a in messages %}{% for b in messages %}{% for c in messages %}x{% endfor %}{% endfor %}{% endfor %}",
    "{% for m in messages %}{{ m['content'] % 3 }}{% endfor %}", "{{ 'x'.ljust(999999999) }}", "{% if %}",
    "{{" + "(" * 500, "{{ messages | join(messages[0]['content']) }}",
]  # fmt: skip


def tokenizer_with(template: str):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def encoder_with(template: str) -> Encoder:
    return Encoder(tokenizer_with(template), 500, 500)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, GOOD, RETURNING, SPOKEN, THINKING, *TEMPLATES.values()])
def test_templates_of_usual_models_are_tame(template):
    assert is_tame(template)


@pytest.mark.parametrize("template", [*GROWING, *SUSPECT])
def test_what_could_grow_by_itself_is_not_tame(template):
    assert not is_tame(template)
    assert not is_tame(GOOD + template)


@pytest.mark.parametrize("template", GROWING)
def test_a_template_without_end_is_ended_and_not_tried_again(template, monkeypatch):
    monkeypatch.setattr("rlhf_fast.data.rendering.SECONDS", 1)
    encoder, row = encoder_with(GOOD + template), Row("a.jsonl:7", {"messages": MESSAGES})
    with pytest.raises(
        UserError, match=r"chat template refuses this conversation: it (takes more than 1 s|needs more than)"
    ):
        encoder.conversation(row)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"it (takes more than|needs more than)"):
        encoder.conversation(row)
    assert time.monotonic() - start < 0.5


def test_a_process_of_its_own_renders_the_same():
    template = TEMPLATES["generation"]
    plain, fenced = tokenizer_with(template), tokenizer_with("{% macro f() %}{% endmacro %}" + template)
    encoders = [Encoder(tokenizer, 500, 500) for tokenizer in (plain, fenced)]
    assert encoders[0].template._renderer.tame
    assert not encoders[1].template._renderer.tame
    row = Row("a.jsonl:7", {"messages": MESSAGES})
    one, other = (encoder.conversation(row) for encoder in encoders)
    assert one == other
    assert any(one.learnt)
    refusing = encoder_with("{{ 'x' * 3 }}{{ raise_exception('Roles must\nalternate') }}")
    with pytest.raises(UserError, match="refuses this conversation: Roles must alternate"):
        refusing.conversation(row)


def test_the_process_ends_with_the_one_that_started_it(tmp_path):
    child = os.fork()
    if child == 0:
        renderer = Renderer(tokenizer_with("{{ 'x' * 3 }}"))
        renderer(MESSAGES, tokenize=False)
        (tmp_path / "pid").write_text(json.dumps(renderer._worker.process.pid))
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    worker, deadline = json.loads((tmp_path / "pid").read_text()), time.monotonic() + 30
    while time.monotonic() < deadline and _lives(worker):
        time.sleep(0.2)
    assert not _lives(worker)


def _lives(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
