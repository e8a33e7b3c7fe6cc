"""A message in a chat's form: the template's ids and nothing else, and what cannot be written so."""

from __future__ import annotations

import pytest

from tests.places.tokenizers import with_template
from was_search.errors import ConfigError
from was_search.texts.chat import chat_ids

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def with_chat(template):
    """A tokenizer of bytes, which begins plain text with two tokens of its own."""
    tokenizer = with_template("[gMASK] <sop> $A")
    tokenizer.chat_template = template
    return tokenizer


def test_the_template_alone_says_what_is_read():
    tokenizer = with_chat(TEMPLATE)
    found = chat_ids("hi é", tokenizer).tolist()
    assert tokenizer.decode(found) == "<s>[user]hi é</s>[assistant]"
    assert (found[0], found.count(257), found.count(258)) == (256, 1, 0)


def test_of_several_templates_the_default_is_taken():
    tokenizer = with_chat({"default": TEMPLATE, "tool_use": "never"})
    assert tokenizer.decode(chat_ids("hi", tokenizer)) == "<s>[user]hi</s>[assistant]"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            None,
            "chat: the model's tokenizer has no chat template; give a plain prompt .*, or take a model that was tuned",
        ),
        ("{{ raise_exception('no system message') }}", r"cannot be rendered \(TemplateError: no system message\);"),
        ("{% for m in messages %}", r"cannot be rendered \(TemplateSyntaxError: .*or give a plain prompt .* written"),
        ("{{ ().__class__.__base__.__subclasses__() }}", r"cannot be rendered \(SecurityError: "),
        ({"tool_use": TEMPLATE}, r"cannot be rendered \(ValueError: "),
        ("{# nothing #}", "chat: the tokenizer's chat template gives no tokens; correct it, or give a plain prompt"),
    ],
)
def test_what_cannot_be_written_so(template, words):
    with pytest.raises(ConfigError, match=words) as caught:
        chat_ids("hi", with_chat(template))
    assert "\n" not in str(caught.value)
