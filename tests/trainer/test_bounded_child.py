"""A child with bounds, and a chat template in it that does not end or takes all memory."""

from __future__ import annotations

import gc
import subprocess
import sys

import psutil
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qlora_storage.errors import UserError
from qlora_trainer.bounded_child import BoundedChild, BoundExceededError, ChildBounds
from qlora_trainer.data.chat_template import ChatTemplate
from qlora_trainer.data.rows.conversation import read_conversation

SMALL = ChildBounds(seconds=1, memory_bytes=512 << 20)
RENDERING = "qlora_trainer.data.rendering.service:serve"
SETUP = {"template": "{{ messages[0].content }}", "variables": {}, "tool_template": None, "tokens": [], "special": []}
CHAT = [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "Blue."}]

BOMBS = [
    pytest.param("{{ 9 ** (9 ** 9) }}", "(1 s of|512 MiB)", id="a-power-that-is-worked-out-while-compiling"),
    pytest.param("{{ (messages[0].content | length + 7) ** (9 ** 9) % 7 }}", "(1 s of|512 MiB)", id="a-power-of-a-row"),
    pytest.param("{{ 'a' * 10 ** 10 }}", "512 MiB of memory", id="a-text-that-is-made-while-compiling"),
    pytest.param("{{ messages[0].content * 10 ** 10 }}", "512 MiB of memory", id="a-long-text"),
    pytest.param(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}",
        "1 s of processor time",
        id="loops-in-loops",
    ),
    pytest.param(
        "{% set ns = namespace(x='ab') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "512 MiB of memory",
        id="doubling",
    ),
    pytest.param("{{ '%99999999999d' % 1 }}", "512 MiB of memory", id="a-wide-format"),
]


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


@pytest.mark.parametrize(("bomb", "what"), BOMBS)
def test_a_template_that_goes_beyond_its_bounds_is_the_users_error_and_names_it(bomb, what, tokenizer):
    template = ChatTemplate(tokenizer, bomb + "{{ messages[0].content }}", SMALL)
    conversation = read_conversation(CHAT, None, 7, "spec.dataset.columns.messages")
    with pytest.raises(UserError, match=rf"^spec\.dataset\.chatTemplate: this template takes more than {what}"):
        template.render([conversation], [7], everything=False)


def test_the_row_that_is_too_much_for_a_template_is_found_among_others(tokenizer):
    source = "{% for m in messages %}{{ m.content * (10 ** 10 if m.content == 'Q9' else 1) }}<|im_end|>{% endfor %}"
    rows = [read_conversation([{**CHAT[0], "content": f"Q{n}"}, CHAT[1]], None, n, "field") for n in range(20)]
    with pytest.raises(UserError, match=r"takes more than 512 MiB of memory for row 9$"):
        ChatTemplate(tokenizer, source, SMALL).render(rows, range(20), everything=False)


def test_a_child_is_started_again_after_it_went_beyond_its_bounds():
    child = BoundedChild(RENDERING, SETUP, SMALL)
    bomb = {"prompt": [{"role": "user", "content": "x"}]}
    assert child.call(bomb) == {"text": "x"}
    hungry = BoundedChild(RENDERING, {**SETUP, "template": "{{ messages[0].content * 10 ** 10 }}"}, SMALL)
    for _ in range(2):
        with pytest.raises(BoundExceededError, match="takes more than 512 MiB of memory"):
            hungry.call(bomb)
    assert child.call(bomb) == {"text": "x"}
    child.close()


def test_a_child_ends_with_its_owner():
    before = {process.pid for process in psutil.Process().children()}
    child = BoundedChild(RENDERING, SETUP, SMALL)
    child.call({"about": True})
    (mine,) = [process for process in psutil.Process().children() if process.pid not in before]
    del child
    gc.collect()
    assert not mine.is_running()


def test_what_a_service_raises_is_raised():
    with pytest.raises(RuntimeError, match=r"KeyError: 'template'"):
        BoundedChild(RENDERING, {}, SMALL).call({})


def test_a_child_imports_nothing_heavy():
    """It starts in a fifth of a second, and its bound of memory leaves room for rows."""
    heavy = "{'torch', 'transformers', 'numpy', 'pydantic'}"
    code = f"import sys, qlora_trainer.bounded_child, {RENDERING.partition(':')[0]}; print({heavy} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"set()\n"
