from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qlora_api.spec import Columns
from qlora_trainer.data.formats import Encoder, needed_columns, render_instruction
from qlora_trainer.errors import UserError

TURNS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def counted(encoded, tokenizer) -> str:
    return tokenizer.decode([t for t, counts in zip(encoded.input_ids, encoded.targets, strict=True) if counts])


def test_a_text_ends_with_the_end_token_and_all_of_it_counts(tokenizer, dataset):
    encoded = Encoder(tokenizer, dataset(format="Text")).encode({"text": "def f(x): return x"})
    assert tokenizer.decode(encoded.input_ids) == "def f(x): return x<eos>"
    assert all(encoded.targets)
    assert not encoded.truncated


def test_of_a_pair_only_the_completion_and_the_end_token_count(tokenizer, dataset):
    encoded = Encoder(tokenizer, dataset(format="PromptCompletion")).encode({"prompt": "return", "completion": " x"})
    assert tokenizer.decode(encoded.input_ids) == "return x<eos>"
    assert counted(encoded, tokenizer) == " x<eos>"


@pytest.mark.parametrize("answer", ["", "  ", "\n\n", "\u200b"])
@pytest.mark.parametrize("form", ["PromptCompletion", "Instruction"])
def test_of_a_blank_answer_nothing_is_learned(tokenizer, dataset, form, answer):
    row = {"prompt": "return", "completion": answer, "instruction": "Add.", "output": answer}
    assert not any(Encoder(tokenizer, dataset(format=form)).encode(row).targets)


@pytest.mark.parametrize("blank", ["", "  ", "\n\n", "\u200b"])
def test_a_blank_text_is_not_learned(blank, begin_tokenizer, tokenizer, dataset):
    for each in (begin_tokenizer, tokenizer):
        [row] = Encoder(each, dataset(format="Text")).encode_batch([{"text": blank}])
        assert not any(row.examples[0].targets)
        assert row.empty == 1


@pytest.mark.parametrize("blank", ["", "  ", "\n\n", "\u200b"])
@pytest.mark.parametrize("form", ["PromptCompletion", "Instruction"])
def test_of_a_blank_answer_neither_it_nor_its_end_is_learned_where_all_is(blank, form, tokenizer, dataset):
    row = {"prompt": "return", "completion": blank, "instruction": "Add.", "output": blank}
    encoder = Encoder(tokenizer, dataset(format=form, loss_on="All"))
    [encoded] = encoder.encode_batch([row])
    assert counted(encoded.examples[0], tokenizer) == tokenizer.decode(
        encoder.prompt(row["prompt" if form[0] == "P" else "instruction"])
    )
    assert encoded.empty == 1


def test_all_of_a_pair_counts_on_request(tokenizer, dataset):
    encoder = Encoder(tokenizer, dataset(format="PromptCompletion", loss_on="All"))
    assert all(encoder.encode({"prompt": "return", "completion": " x"}).targets)


def test_no_token_reaches_over_the_end_of_the_prompt(tokenizer, dataset):
    """So the prompt's tokens in training are those of generation, where the completion is not there yet."""
    together = tokenizer("return", add_special_tokens=False)["input_ids"]
    prompt = tokenizer("ret", add_special_tokens=False)["input_ids"]
    assert together[: len(prompt)] != prompt, "the tokenizer merges over this boundary"
    encoded = Encoder(tokenizer, dataset(format="PromptCompletion")).encode({"prompt": "ret", "completion": "urn"})
    assert encoded.input_ids[: len(prompt)] == prompt
    assert counted(encoded, tokenizer) == "urn<eos>"


def test_the_begin_token_stands_first_once_and_does_not_count(begin_tokenizer, dataset):
    encoder = Encoder(begin_tokenizer, dataset(format="PromptCompletion"))
    begin, end = begin_tokenizer.bos_token_id, begin_tokenizer.eos_token_id
    encoded = encoder.encode({"prompt": "return", "completion": "x"})
    assert encoded.input_ids.count(begin) == 1
    assert encoded.input_ids[0] == begin
    prompt = begin_tokenizer("return")["input_ids"]
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.targets == [False] * len(prompt) + [True] * (len(encoded.input_ids) - len(prompt))
    assert encoded.input_ids[-1] == end


def test_tokens_that_a_tokenizer_puts_first_stand_first_without_a_begin_token(byte_level, dataset):
    """As GLM 4's [gMASK]<sop>."""
    first = processors.TemplateProcessing(
        single="<bos> <|im_start|> $A",
        special_tokens=[(t, byte_level.token_to_id(t)) for t in ("<bos>", "<|im_start|>")],
    )
    own = Tokenizer.from_str(byte_level.to_str())
    own.post_processor = first
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<eos>")
    encoder = Encoder(tokenizer, dataset(format="PromptCompletion"))
    encoded = encoder.encode({"prompt": "return", "completion": "x"})
    assert (
        encoded.input_ids[: len(encoder.prompt("return"))]
        == encoder.prompt("return")
        == tokenizer("return")["input_ids"]
    )
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids[:2]) == ["<bos>", "<|im_start|>"]
    assert encoder.encode({"prompt": "<bos><|im_start|>return", "completion": "x"}) == encoded


@pytest.mark.parametrize(
    ("prompt", "completion"), [("f(", ")"), ("Q\n", "\nA"), ("return", " the value"), ("a", "="), ("x", "0a\n")]
)
def test_a_completion_continues_its_prompt_without_a_space_of_the_tokenizers(
    prompt, completion, begin_tokenizer, dataset
):
    encoded = Encoder(begin_tokenizer, dataset(format="PromptCompletion")).encode(
        {"prompt": prompt, "completion": completion}
    )
    counted = [token for token, counts in zip(encoded.input_ids, encoded.targets, strict=True) if counts]
    assert counted[-1] == begin_tokenizer.eos_token_id
    assert encoded.input_ids[: -len(counted)] == begin_tokenizer(prompt)["input_ids"]
    text = begin_tokenizer.decode(encoded.input_ids[1:-1])
    assert text == begin_tokenizer.decode(begin_tokenizer(prompt + completion)["input_ids"][1:])


def test_begin_and_end_written_as_text_are_not_doubled(begin_tokenizer, dataset):
    encoder = Encoder(begin_tokenizer, dataset(format="PromptCompletion"))
    plain = encoder.encode({"prompt": "return", "completion": "x"})
    written = encoder.encode({"prompt": "<bos>return", "completion": "x<eos>"})
    assert written.input_ids.count(begin_tokenizer.bos_token_id) == 1
    assert written.input_ids.count(begin_tokenizer.eos_token_id) == 1
    assert written.input_ids[-1] == plain.input_ids[-1]
    assert written.targets[-1]


@pytest.mark.parametrize(
    ("row", "want"),
    [
        pytest.param(
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a"
            " response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n###"
            " Response:\n",
            id="with-input",
        ),
        *(
            pytest.param(
                {"instruction": "Add.", **more, "output": "3"},
                "Below is an instruction that describes a task. Write a response that appropriately completes the"
                " request.\n\n### Instruction:\nAdd.\n\n### Response:\n",
                id=f"{name}-input",
            )
            for name, more in (("without", {}), ("none-as", {"input": None}), ("blank", {"input": " "}))
        ),
    ],
)
def test_an_instruction_is_written_as_alpaca_does_and_its_output_counts(row, want, tokenizer, dataset):
    assert render_instruction(row, Columns()) == want
    encoded = Encoder(tokenizer, dataset(format="Instruction")).encode(row)
    assert tokenizer.decode(encoded.input_ids) == want + "3<eos>"
    assert counted(encoded, tokenizer) == "3<eos>"


def test_braces_in_an_instruction_are_text(tokenizer, dataset):
    row = {"instruction": "{input} {0}", "input": "{instruction}", "output": "{}"}
    encoded = Encoder(tokenizer, dataset(format="Instruction")).encode(row)
    assert "### Instruction:\n{input} {0}\n\n### Input:\n{instruction}\n" in tokenizer.decode(encoded.input_ids)


def test_columns_are_those_of_the_manifest(tokenizer, dataset):
    spec = dataset(format="PromptCompletion", columns=Columns(prompt="q", completion="a"))
    assert needed_columns(spec) == (
        {"q": "spec.dataset.columns.prompt", "a": "spec.dataset.columns.completion"},
        ("tools", "system", "functions"),
    )
    assert counted(Encoder(tokenizer, spec).encode({"q": "x", "a": "y"}), tokenizer) == "y<eos>"


def test_rows_encode_alike_alone_and_together(tokenizer, dataset, pairs):
    encoder = Encoder(tokenizer, dataset(format="PromptCompletion"))
    assert [row.examples for row in encoder.encode_batch(pairs[:20])] == [[encoder.encode(row)] for row in pairs[:20]]


@pytest.mark.parametrize(
    ("long_rows", "length", "truncated"),
    [
        pytest.param("Truncate", 16, True, id="truncate-cuts-the-tail"),
        *(pytest.param(p, 101, False, id=f"{p.lower()}-leaves-it") for p in ("Fail", "Drop")),
    ],
)
def test_a_long_row(long_rows, length, truncated, tokenizer, dataset):
    encoder = Encoder(tokenizer, dataset(format="Text", max_length=16, long_rows=long_rows))
    whole = Encoder(tokenizer, dataset(format="Text")).encode({"text": "<bos>" * 100}).input_ids
    encoded = encoder.encode({"text": "<bos>" * 100})
    assert encoded.input_ids == whole[:length]
    assert len(encoded.targets) == length
    assert encoded.truncated is truncated
    assert encoded.full_length == 101


def test_a_tokenizer_that_cuts_and_pads_by_itself_does_not(byte_level, dataset):
    """tokenizer.json can carry both settings."""
    own = Tokenizer.from_str(byte_level.to_str())
    own.enable_truncation(4)
    own.enable_padding(length=64)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<eos>")
    assert Encoder(tokenizer, dataset(format="Text")).encode({"text": "<bos>" * 9}).full_length == 10


@pytest.mark.parametrize(
    ("spec", "row", "want"),
    [
        pytest.param(
            {"format": "Text"},
            {"text": None},
            'spec.dataset.columns.text: "text" must hold text in every row; row 5 holds nothing',
            id="text-none",
        ),
        pytest.param(
            {"format": "PromptCompletion"},
            {"prompt": "a", "completion": 7},
            'spec.dataset.columns.completion: "completion" must hold text in every row; row 5 holds a number',
            id="completion-number",
        ),
        pytest.param(
            {"format": "PromptCompletion", "columns": Columns(prompt="q")},
            {"q": ["a" * 99], "completion": "b"},
            'spec.dataset.columns.prompt: "q" must hold text in every row; row 5 holds a list',
            id="prompt-list-in-renamed-column",
        ),
        pytest.param(
            {"format": "Instruction"},
            {"instruction": "a", "input": 1.5, "output": "b"},
            'spec.dataset.columns.input: "input" must hold text in every row; row 5 holds a number',
            id="input-number",
        ),
        pytest.param(
            {"format": "Instruction"},
            {"instruction": "a", "output": None},
            'spec.dataset.columns.output: "output" must hold text in every row; row 5 holds nothing',
            id="output-none",
        ),
    ],
)
def test_a_cell_that_is_not_text_is_named_with_its_row(spec, row, want, tokenizer, dataset):
    with pytest.raises(UserError) as caught:
        Encoder(tokenizer, dataset(**spec)).encode(row, number=5)
    assert str(caught.value).startswith(want)


def test_a_tokenizer_without_an_end_token_is_refused(dataset):
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match=r"^spec.model.source: its tokenizer has no end token"):
        Encoder(PreTrainedTokenizerFast(tokenizer_object=words), dataset(format="Text"))


@pytest.mark.parametrize(
    ("settings", "row", "asked"),
    [
        ({"format": "Text"}, {"text": "return"}, "return"),
        ({"format": "PromptCompletion"}, {"prompt": "return", "completion": " x"}, "return"),
        ({"format": "Instruction"}, {"instruction": "Add.", "output": "3"}, "Add."),
        (
            {"format": "Messages", "chat_template": TURNS},
            {"messages": [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}]},
            "Add.",
        ),
    ],
    ids=lambda value: value.get("format") if isinstance(value, dict) else None,
)
def test_a_prompt_is_asked_in_the_tokens_in_which_it_was_taught(begin_tokenizer, dataset, settings, row, asked):
    encoder = Encoder(begin_tokenizer, dataset(**settings))
    prompt = encoder.prompt(asked)
    encoded = encoder.encode(row)
    assert encoded.input_ids[: len(prompt)] == prompt
    if settings["format"] != "Text":
        assert encoded.targets.index(True) == len(prompt), "where the answer begins in training"
