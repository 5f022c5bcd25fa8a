"""YAML as kubectl and the API server read it."""

import pytest

from qlora_cli.text import kubernetes_yaml


def read_one(text):
    (document,) = kubernetes_yaml.read(text, "job.yaml")
    return document


# Expected values are those of go-yaml 2 (sigs.k8s.io/yaml, goyaml.v2/resolve.go and decode_test.go).
@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("2e-4", 0.0002),
        ("1e3", 1000),
        ("16.0", 16),
        (".5", 0.5),
        ("685_230", 685230),
        ("014", 12),
        ("0o14", 12),
        ("0x1F", 31),
        ("-0b101", -5),
        ("09", 9),
        ("1e999", "1e999"),
        ("1:30", "1:30"),
        ("190:20:30.15", "190:20:30.15"),
        ("2024-01-02", "2024-01-02"),
        ("1.2.3", "1.2.3"),
        ("+", "+"),
        ("-", "-"),
        ("y", True),
        ("No", False),
        ("on", True),
        ("yEs", "yEs"),
        ("~", None),
        ("", None),
        ("NF4", "NF4"),
    ],
)
def test_unquoted_scalars(text, want):
    found = kubernetes_yaml.scalar(text)
    assert (found, type(found)) == (want, type(want))


@pytest.mark.parametrize("text", ["'2e-4'", '"2e-4"', "!!str 2e-4", "|-\n  2e-4"])
def test_quoted_scalars_are_texts(text):
    assert read_one(f"a: {text}").value == {"a": "2e-4"}


def test_a_field_given_twice_is_an_error_with_both_lines():
    document = read_one("spec:\n  a: 1\n  b: 2\n  a: 3\n")
    (error,) = document.errors
    assert str(error) == "spec.a: is given twice, in lines 2 and 4"


def test_a_merged_field_may_be_given_again():
    document = read_one("p: &p {a: 1, b: 2}\nq:\n  <<: *p\n  a: 3\n")
    assert document.value["q"] == {"a": 3, "b": 2}
    assert document.errors == ()


def test_names_that_are_no_texts_become_texts():
    assert read_one("{1: a, on: b}").value == {"1": "a", "true": "b"}


def test_lines_are_known_by_path_and_those_of_missing_fields_by_the_group_around_them():
    document = read_one("kind: A\nspec:\n  list:\n  - x\n  - name: y\n")
    assert [document.line_of(p) for p in ("kind", "spec.list[0]", "spec.list[1].name", "spec.list[1].no", "no")] == [
        1, 4, 5, 5, 1,
    ]  # fmt: skip


def test_empty_documents_are_passed_over_and_lines_count_on():
    documents = kubernetes_yaml.read("---\n---\na: 1\n---\n# nothing\n---\nb: 2\n", "job.yaml")
    assert [(d.value, d.line) for d in documents] == [({"a": 1}, 3), ({"b": 2}, 7)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("a: [1, 2", "job.yaml:1:9: YAML syntax error", id="unclosed"),
        pytest.param("a:\n\t- 1", "job.yaml:2:1: YAML syntax error", id="tab"),
        pytest.param(
            "lora:\n  rank: 8\n   alpha: 16", "job.yaml:3:9: .*check the indentation of lines 2 and 3", id="unaligned"
        ),
        pytest.param("a: &x [*x]", "contains itself", id="recursion"),
        pytest.param("a: !!python/name:os.system x", "is not known here", id="python-tag"),
        pytest.param("a: !!int x", "is not known here", id="wrong-tag"),
        pytest.param("? [a]\n: 1", "must be a text", id="list-as-name"),
        pytest.param("a: \x01", "YAML syntax error", id="control-character"),
    ],
)
def test_what_is_no_manifest_is_refused_with_its_place(text, message):
    with pytest.raises(kubernetes_yaml.NotYamlError, match=message.replace("[", r"\[")):
        kubernetes_yaml.read(text, "job.yaml")


def test_aliases_cannot_unfold_to_billions():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(kubernetes_yaml.NotYamlError, match="unfold"):
        kubernetes_yaml.read("\n".join(lines), "job.yaml")


def test_numbers_that_json_cannot_hold_are_errors():
    assert "no number that JSON can hold" in str(read_one("a: .nan").errors[0])


@pytest.mark.parametrize("text", ["2e-4", "014", "y", "NF4", "", "null", "1:30", "a: b", "- a", "line\nline"])
def test_texts_are_written_so_that_they_stay_texts(text):
    assert read_one(kubernetes_yaml.dump({"default": text})).value == {"default": text}


@pytest.mark.parametrize("text", ["spec: " + "[" * 100_000, "{a: " * 50_000], ids=["lists", "mappings"])
def test_a_document_that_is_nested_too_deep_is_named(text):
    with pytest.raises(kubernetes_yaml.NotYamlError, match=r"job\.yaml: is nested too deep to be a manifest"):
        kubernetes_yaml.read(text, "job.yaml")
