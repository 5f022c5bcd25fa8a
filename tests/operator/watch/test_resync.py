"""Deletions that no watch saw, found in kopf's requests."""

from __future__ import annotations

import pytest

from qlora_operator.watch.resync import Listings

PODS = "/api/v1/namespaces/team/pods"
LIST, WATCH = f"{PODS}?limit=500&labelSelector=x", f"{PODS}?watch=true&resourceVersion=7"


@pytest.mark.parametrize(
    ("requests", "news"),
    [
        pytest.param([LIST], False, id="the-list-is-not-there-yet"),
        pytest.param([LIST, WATCH], True, id="first-listing"),
        pytest.param([WATCH, WATCH], False, id="a-watch-that-goes-on"),
        pytest.param([WATCH, LIST, LIST, WATCH], True, id="listed-anew-page-by-page"),
        pytest.param([LIST, WATCH.replace("team", "other")], False, id="of-another-namespace"),
        pytest.param(["/api/v1/events?limit=500", "/api/v1/events?watch=true"], False, id="nothing-the-store-holds"),
        pytest.param(["/apis/batch/v1", "/apis/batch/v1?watch=true"], False, id="discovery"),
    ],
)
def test_something_may_have_been_deleted_unseen_when_a_watch_begins_after_a_listing(requests, news):
    listings = Listings()
    for path in requests:
        listings.note(path)
    assert listings.news.is_set() == news
