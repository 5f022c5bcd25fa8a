"""No text of a row is in what others may read: an error that ends in the status, output, or log."""

from __future__ import annotations

import gzip
import json
import logging
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest

from qlora_api.contract import PrepareReceipt
from qlora_trainer.errors import UserError
from qlora_trainer.prepare.tokenize_rows import prepare_data

if TYPE_CHECKING:
    from pathlib import Path

MARK = "Zebra"
CHAT = [{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}]
PAIR = {"prompt": MARK, "completion": MARK}
PAIRS = {"format": "PromptCompletion"}
MESSAGES = {"format": "Messages"}


def line(value: Any) -> str:
    return json.dumps(value) + "\n"


def parquet(**columns: Any):
    def write(path: Path) -> None:
        pa_parquet.write_table(pa.table(columns), path)

    return write


def arrow(**columns: Any):
    def write(path: Path) -> None:
        table = pa.table(columns)
        with pa.ipc.new_stream(path, table.schema) as file:
            file.write_table(table)

    return write


def damaged_arrow(path: Path) -> None:
    arrow(prompt=[MARK * 9], completion=[MARK * 9])(path)
    data = bytearray(path.read_bytes())
    offsets = data.rindex((0).to_bytes(4, "little") + (45).to_bytes(4, "little"))
    data[offsets + 4 : offsets + 8] = (46).to_bytes(4, "little")
    path.write_bytes(data)


NOT_UTF8 = pa.array([MARK.encode() + b"\xff"]).view(pa.string())


def chat(*messages: Any, **more: Any) -> str:
    return line({"messages": [*CHAT, *messages], **more})


@pytest.mark.parametrize(
    ("name", "rows", "settings"),
    [
        pytest.param("a.jsonl", f'{{"prompt": "{MARK}', PAIRS, id="json-cut-off"),
        pytest.param("a.jsonl", f'{{"prompt": {MARK}}}', PAIRS, id="json-without-quotes"),
        pytest.param("a.jsonl", f'"{MARK}"', PAIRS, id="json-text"),
        pytest.param("a.jsonl", line([MARK]), PAIRS, id="json-list"),
        pytest.param("a.jsonl", line({**PAIR, "completion": [MARK]}), PAIRS, id="json-list-for-text"),
        pytest.param("a.jsonl", line({**PAIR, "completion": {MARK: MARK}}), PAIRS, id="json-object-for-text"),
        pytest.param("a.jsonl", line(PAIR) + line({"prompt": MARK}), PAIRS, id="json-key-missing-later"),
        pytest.param("a.jsonl", f'{{"prompt": "{MARK}", "completion": 1}} {MARK}', PAIRS, id="json-more-after-it"),
        pytest.param("a.jsonl", f'{{"prompt": "{MARK}\\ud800"}}', PAIRS, id="json-surrogate"),
        pytest.param("a.jsonl", f'{{"prompt": "{MARK}'.encode() + b'\xff"}', PAIRS, id="json-no-utf8"),
        pytest.param("a.jsonl", line({f"{MARK} 1": MARK, "is a patient": MARK}), PAIRS, id="json-keys-that-are-text"),
        pytest.param("a.json", json.dumps([PAIR, MARK]), PAIRS, id="array-of-texts"),
        pytest.param("a.json", json.dumps([PAIR])[:-1] + f" {MARK}", PAIRS, id="array-that-goes-on"),
        pytest.param("a.json", json.dumps([PAIR]) + MARK, PAIRS, id="array-with-more-after-it"),
        pytest.param("a.json", f'[{{"prompt": "{MARK}\\x"}}]', PAIRS, id="array-with-a-bad-escape"),
        pytest.param("a.json", json.dumps({"data": [PAIR]}), PAIRS, id="array-inside-an-object"),
        pytest.param("a.csv", f"prompt,completion\n{MARK},1,2\n", PAIRS, id="csv-too-many-cells"),
        pytest.param("a.csv", f"prompt,completion\n{MARK}\n", PAIRS, id="csv-too-few-cells"),
        pytest.param("a.csv", f'prompt,completion\n"{MARK}"x,1\n', PAIRS, id="csv-text-after-a-quote"),
        pytest.param("a.csv", f'prompt,completion\n"{MARK},1\n', PAIRS, id="csv-open-quote"),
        pytest.param("a.csv", f"{MARK} is ill,since 1970\n{MARK},1\n", PAIRS, id="csv-without-a-header"),
        pytest.param("a.csv", f"{MARK},{MARK}\n{MARK},1\n", PAIRS, id="csv-header-with-a-name-twice"),
        pytest.param("a.csv", f"prompt,completion\n{MARK},".encode() + b"\xff\n", PAIRS, id="csv-no-utf8"),
        pytest.param("a.tsv", f"prompt\tcompletion\n{MARK}\n", PAIRS, id="tsv"),
        pytest.param("a.csv.gz", gzip.compress(f"prompt,completion\n{MARK}\n".encode()), PAIRS, id="csv-compressed"),
        pytest.param("a.csv", f'messages\n"[{MARK}"\n', MESSAGES, id="csv-of-messages-that-are-no-json"),
        pytest.param(
            "a.csv",
            'messages\n"[{""role"": ""assistant"", ""content"": ""' + MARK + '\\ud800""}]"\n',
            {**MESSAGES, "loss_on": "All"},
            id="csv-of-messages-that-the-tokenizer-cannot-take",
        ),
        pytest.param("a.parquet", parquet(prompt=[[MARK]], completion=[MARK]), PAIRS, id="parquet-list"),
        pytest.param("a.parquet", parquet(prompt=NOT_UTF8, completion=[MARK]), PAIRS, id="parquet-no-utf8"),
        pytest.param("a.parquet", parquet(prompt=[MARK.encode()], completion=[MARK]), PAIRS, id="parquet-bytes"),
        pytest.param("a.parquet", f"PAR1{MARK}PAR1".encode(), PAIRS, id="parquet-damaged"),
        pytest.param("a.arrow", damaged_arrow, PAIRS, id="arrow-damaged"),
        pytest.param("a.arrow", arrow(prompt=[{MARK: MARK}], completion=[MARK]), PAIRS, id="arrow-struct"),
        pytest.param("a.jsonl", line({"messages": MARK}), MESSAGES, id="messages-text"),
        pytest.param("a.jsonl", line({"messages": {MARK: MARK}}), MESSAGES, id="messages-object"),
        pytest.param("a.jsonl", chat(MARK), MESSAGES, id="message-text"),
        pytest.param("a.jsonl", chat({MARK: MARK}), MESSAGES, id="message-without-role"),
        pytest.param("a.jsonl", chat({"from": MARK, "value": MARK}), MESSAGES, id="message-of-a-stranger"),
        pytest.param("a.jsonl", chat({"role": "user", "content": {MARK: MARK}}), MESSAGES, id="content-object"),
        pytest.param("a.jsonl", chat({"role": "user", "content": [{MARK: MARK}]}), MESSAGES, id="content-part"),
        pytest.param("a.jsonl", chat({"role": "user", "content": MARK, "weight": MARK}), MESSAGES, id="weight"),
        pytest.param("a.jsonl", chat({"role": "assistant", "tool_calls": MARK}), MESSAGES, id="tool-calls"),
        pytest.param(
            "a.jsonl", chat({"role": "assistant", "tool_calls": [{"arguments": MARK}]}), MESSAGES, id="tool-arguments"
        ),
        pytest.param("a.jsonl", chat(tools=MARK), MESSAGES, id="tools"),
        *(
            pytest.param("a.jsonl", chat(), {**MESSAGES, "chat_template": template}, id=f"template-{name}")
            for name, template in {
                "raises-the-content": "{{ raise_exception('bad: ' + messages[0].content) }}",
                "looks-up-the-content": "{{ messages[0][messages[0].content].x }}",
                "converts-the-content": "{% set n = namespace(x=messages[0].content) %}{{ '%d' | format(n.x) }}",
                "calls-the-content": "{{ messages[0].content() }}",
                "parses-the-content": "{{ messages[0].content.encode('ascii').decode('utf-16') }}",
            }.items()
        ),
        *(
            pytest.param("a.jsonl", chat(*CHAT), {**MESSAGES, "chat_template": template}, id=f"turns-{name}")
            for name, template in {
                "opened-by-the-prompt": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
                "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
                "that-repeat-the-first": "{{ messages | length }}{{ messages[-1].content }}"
                "{% for m in messages %}{{ m.content }}{% endfor %}",
                "in-another-order": "{% for m in messages | reverse %}{{ m.role }}:{{ m.content }};{% endfor %}",
            }.items()
        ),
        pytest.param("a.jsonl", line({**PAIR, "prompt": MARK * 99}), {**PAIRS, "max_length": 16}, id="row-too-long"),
        pytest.param("a.jsonl", line({**PAIR, "completion": ""}), PAIRS, id="nothing-to-learn"),
    ],
)
def test_an_error_about_a_row_quotes_none_of_it(name, rows, settings, chat_tokenizer, job, tmp_path, caplog, capfd):
    path = tmp_path / name
    if callable(rows):
        rows(path)
    else:
        path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError) as caught:
        prepare_data(job(**settings), chat_tokenizer, "t1", path, None, tmp_path / "cache")
    message = str(caught.value)
    assert message.startswith("spec.dataset")
    assert MARK not in message + caplog.text + "".join(capfd.readouterr())
    assert "\n" not in message


def test_a_receipt_that_is_damaged_is_not_quoted():
    with pytest.raises(ValueError, match="dataHash") as caught:
        PrepareReceipt.model_validate_json(json.dumps({"samples": [MARK], "trainRows": MARK}))
    assert MARK not in str(caught.value)
