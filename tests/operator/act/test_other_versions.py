"""Keep what a later version of the operator wrote into status."""

from __future__ import annotations

import pytest

from qlora_api.crd import structural
from qlora_api.status import QLoRAJobStatus
from qlora_api.sweep.status import QLoRASweepStatus
from qlora_operator.act.other_versions import with_unknown_fields

LATER = {"detail": "of a later version"}
LISTS = [
    pytest.param(name, field["x-kubernetes-list-map-keys"][0], model, id=f"{model.__name__}-{name}")
    for model in (QLoRAJobStatus, QLoRASweepStatus)
    for name, field in structural(model)["properties"].items()
    if "x-kubernetes-list-map-keys" in field
]


@pytest.mark.parametrize(("name", "key", "model"), LISTS)
def test_an_unknown_field_stays_with_the_item_that_has_it(name, key, model):
    stored = {name: [{key: "a", **LATER}, {key: "b"}, {key: "c", "other": 1}]}
    written = {name: [{key: "b"}, {key: "a"}, {key: "d"}]}
    assert with_unknown_fields(stored, written, model) == {name: [{key: "b"}, {key: "a", **LATER}, {key: "d"}]}
