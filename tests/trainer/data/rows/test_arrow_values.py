"""Values of Arrow columns become those of rows."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest

from qlora_trainer.errors import UserError

MESSAGES = {"messages": "spec.dataset.columns.messages"}
ASKED = [{"role": "user", "content": "W?"}]


@pytest.mark.parametrize("lists", [pa.list_, pa.large_list, pa.list_view, pa.large_list_view])
def test_padding_of_structs_goes_in_lists_of_any_kind(lists, tmp_path, read_rows):
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("weight", pa.int64())])
    table = pa.table({"messages": pa.array([ASKED], lists(message))})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    assert read_rows(tmp_path / "a.arrow", MESSAGES) == [{"messages": ASKED}]


def test_half_of_a_surrogate_pair_in_a_column_of_json_is_named_with_its_row(tmp_path, read_rows):
    values = pa.array(['[{"role": "user", "content": "a"}]', '[{"role": "user", "content": "\\ud800"}]'])
    table = pa.table({"messages": pa.ExtensionArray.from_storage(pa.json_(), values)})
    pa_parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet, row 2: has half of a surrogate pair"):
        read_rows(tmp_path / "a.parquet", MESSAGES)
