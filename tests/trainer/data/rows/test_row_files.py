"""Files of a source are chosen by their names: the same in a folder, a bucket and on the Hub."""

from __future__ import annotations

import pytest

from qlora_trainer.row_files import MOST_FILES, Kind, RowFilesError, kind_of, select


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", Kind.JSON),
        ("A.JSONL", Kind.JSON),
        ("a.ndjson.zst", Kind.JSON),
        ("a.json.bz2", Kind.JSON),
        ("a.csv.gz", Kind.CSV),
        ("a.TSV", Kind.CSV),
        ("a.parquet", Kind.PARQUET),
        ("a.arrow", Kind.ARROW),
        ("a.parquet.gz", None),
        ("a.jsonl.xz", None),
        ("a.zip", None),
        ("a.txt", None),
        ("jsonl", None),
    ],
)
def test_a_file_is_known_by_its_suffixes_in_capitals_or_not(name, kind):
    assert kind_of(name) == kind


def test_all_files_of_a_folder_are_read_and_notes_are_named():
    names = ["b.jsonl", "C.JSONL", "a.jsonl.zst", "sub/d.ndjson", "README.md", ".gitattributes", "_SUCCESS", "LICENSE"]
    selection = select([*names, "load.py", "dataset_infos.json", ".cache/x.jsonl"], evaluation=False)
    assert selection.rows == ("C.JSONL", "a.jsonl.zst", "b.jsonl", "sub/d.ndjson")
    assert set(selection.notes) == {
        ".cache/x.jsonl",
        ".gitattributes",
        "LICENSE",
        "README.md",
        "_SUCCESS",
        "dataset_infos.json",
        "load.py",
    }


@pytest.mark.parametrize(
    ("names", "train", "evaluation"),
    [
        pytest.param(
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000.parquet"],
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            ["data/test-00000.parquet"],
            id="shards-of-the-hub",
        ),
        pytest.param(["train/a.jsonl", "val/a.jsonl"], ["train/a.jsonl"], ["val/a.jsonl"], id="folders"),
        pytest.param(
            ["test.jsonl", "train.jsonl", "validation.jsonl"], ["train.jsonl"], ["validation.jsonl"], id="three-splits"
        ),
        pytest.param(["my_train.csv", "my_eval.csv"], ["my_train.csv"], ["my_eval.csv"], id="words-inside"),
        pytest.param(
            ["split=test/a.parquet", "split=train/a.parquet", "split=validation/a.parquet"],
            ["split=train/a.parquet"],
            ["split=validation/a.parquet"],
            id="folders-of-hive",
        ),
        *(
            pytest.param([held_out, "train.jsonl"], ["train.jsonl"], [held_out], id=held_out)
            for held_out in (
                *(
                    "(test).jsonl",
                    "Holdout.jsonl",
                    "faq-held_out.jsonl",
                    "tests.jsonl",
                    "testData.jsonl",
                    "QATest.jsonl",
                ),
                *("evals/a.jsonl", "heldout2024.jsonl", "data@test.jsonl", "testset.jsonl", "myEvalSplit.jsonl"),
            )
        ),
        *(
            pytest.param(sorted([other, "train.jsonl"]), ["train.jsonl"], None, id=f"train-and-{other}")
            for other in ("more.jsonl", "testv2.jsonl", "validate.jsonl", "tst.csv", "x_te.jsonl")
        ),
        pytest.param(
            ["contest.jsonl", "latest.jsonl", "protestset.jsonl", "retrain.jsonl"],
            ["contest.jsonl", "latest.jsonl", "protestset.jsonl", "retrain.jsonl"],
            None,
            id="parts-of-words",
        ),
    ],
)
def test_of_several_splits_the_one_that_is_meant_is_read_and_the_others_are_named(names, train, evaluation):
    selection = select(names, evaluation=False)
    assert list(selection.rows) == train
    assert sorted([*selection.rows, *selection.other_splits]) == sorted(names)
    if evaluation:
        assert list(select(names, evaluation=True).rows) == evaluation


@pytest.mark.parametrize("name", ["train-00000.parquet", "validation.jsonl", "test/a.jsonl"])
def test_of_evaluation_rows_the_only_split_is_what_is_meant(name):
    """datasets.push_to_hub calls the split of a set without splits "train"."""
    assert select([name], evaluation=True).rows == (name,)


@pytest.mark.parametrize(
    "name", ["README.jsonl", "notice.csv", "changelog.ndjson.gz", "license.parquet", "Copying.json"]
)
def test_a_file_with_the_suffix_of_rows_is_read_however_it_is_named(name):
    assert select([name, "README.md", "LICENSE", "notice.txt"], evaluation=False).rows == (name,)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        pytest.param(
            ["test.jsonl"],
            "has files of the split test alone (test.jsonl), and rows to train on are wanted; if they are meant, name",
            id="test-alone",
        ),
        pytest.param(["split=dev/a.csv"], "has files of the split validation alone", id="validation-alone"),
        pytest.param([], "has no files in it; it must be a file that ends in .jsonl", id="empty"),
        pytest.param(["README.md"], "has no files in it", id="notes-only"),
        pytest.param(["a.jsonl", "b.txt", "c.zip"], "cannot be read as rows: b.txt, c.zip. The source", id="unknown"),
        pytest.param(["a.jsonl", "b.jsonl.xz"], "cannot be read as rows: b.jsonl.xz", id="unknown-compression"),
        pytest.param(["a.jsonl", "b.csv"], "it holds a.jsonl, b.csv (CSV and JSON Lines)", id="kinds"),
        pytest.param(
            ["rows.jsonl", "test.jsonl"],
            "has files of several splits (test: test.jsonl; of no split: rows.jsonl); name the file or folder",
            id="unclear",
        ),
        pytest.param(["test.jsonl", "valid.jsonl"], "has files of several splits (test: test.jsonl; v", id="no-train"),
        pytest.param(["a.jsonl", "d/state.json", "d/0.arrow"], "name its folder, d", id="saved-inside"),
        pytest.param([f"{i}.csv" for i in range(MOST_FILES + 1)], "has 100001 files; at most 100000", id="many"),
    ],
)
def test_names_that_do_not_say_what_is_read_are_refused(names, problem):
    with pytest.raises(RowFilesError) as caught:
        select(names, evaluation=False)
    assert problem in str(caught.value)


def test_of_a_saved_dataset_the_split_that_is_meant_is_read():
    names = ["dataset_dict.json"]
    names += [
        f"{split}/{name}" for split in ("train", "test") for name in ("state.json", "dataset_info.json", "0.arrow")
    ]
    for evaluation, split in ((False, "train"), (True, "test")):
        selection = select(names, evaluation=evaluation)
        assert selection.kind is Kind.SAVED
        assert selection.folder == split
        assert set(selection.rows) == {"dataset_dict.json"} | {n for n in names if n.startswith(split)}
