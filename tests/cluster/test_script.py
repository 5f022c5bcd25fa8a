"""Policies that script pods hold for as long as their block, and no longer."""

from __future__ import annotations

import pytest

from cluster.scenarios import script


def test_a_policy_that_is_not_taken_up_is_deleted(api, kwok_namespace, monkeypatch):
    monkeypatch.setattr(script, "TAKE_UP_SECONDS", 0)
    with (
        pytest.raises(TimeoutError, match="is not in force"),
        script._mutated(api, kwok_namespace, "pods", 'Object.spec{hostname: "a"}', lambda _: False),
    ):
        raise AssertionError
    for plural in ("mutatingadmissionpolicies", "mutatingadmissionpolicybindings"):
        left = api.list(f"/apis/admissionregistration.k8s.io/v1/{plural}")
        assert [each["metadata"]["name"] for each in left if kwok_namespace in each["metadata"]["name"]] == []
