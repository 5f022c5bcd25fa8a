"""A destination is apart from what the job reads."""

from __future__ import annotations

import pytest

from qlora_api.spec import QLoRAJobSpec
from qlora_trainer.errors import UserError
from qlora_trainer.publish.published_adapter import check_apart_from_inputs


def spec(destination, model="s3://bucket/base", rows="s3://bucket/rows"):
    return QLoRAJobSpec.model_validate(
        {
            "model": {"source": model},
            "dataset": {"train": {"source": rows}, "format": "Text"},
            "training": {"epochs": 1, "globalBatchSize": 8},
            "output": {"destination": destination},
        }
    )


@pytest.mark.parametrize("destination", ["s3://bucket/base", "s3://bucket/base/"])
def test_the_folder_of_the_base_is_no_destination(destination):
    with pytest.raises(UserError, match=r"^spec\.output\.destination: .* is the folder of spec\.model\.source: choose"):
        check_apart_from_inputs(spec(destination))


def test_the_folder_of_a_base_on_this_machine_is_none_by_a_link_either(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    with pytest.raises(UserError, match=r"is the folder of spec\.model\.source"):
        check_apart_from_inputs(spec(str(tmp_path / "link"), model=str(tmp_path / "base")))


@pytest.mark.parametrize("destination", ["s3://bucket/rows", "s3://bucket/rows/out"])
def test_what_is_published_is_not_among_the_rows(destination):
    with pytest.raises(UserError, match="would be read as rows"):
        check_apart_from_inputs(spec(destination))


@pytest.mark.parametrize("destination", ["s3://bucket/base/adapters/one", "s3://bucket/base-2", "s3://bucket"])
def test_a_folder_of_its_own_below_the_base_or_beside_it_is_taken(destination):
    check_apart_from_inputs(spec(destination))


def test_a_base_of_the_hub_is_no_folder():
    check_apart_from_inputs(spec("s3://org/base", model="hf://org/base@main"))
