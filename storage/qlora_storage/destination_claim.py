"""Claim a destination, so that of two jobs that name one the second ends in Prepare and not after its training.

A claim is of one run, by its uid: jobs of one name are in other clusters, namespaces and folders too. Where both are
objects of one cluster, namespace and name are enough: a second object of that name means that the first was deleted.

A claim is given up when its job ends by an error of the user's or is put aside on its machine, and expires when no
attempt of the job has begun for LIFETIME: a job that is deleted tells nobody. One that trains for longer in one attempt
may lose its claim, not its adapter: the manifest too is created under a name that must be free.

A claim is never changed: ``.claims/00000001.json`` is followed by ``00000002.json``, and the last one counts. Each is
created under a name that must be free. So exactly one of several that take over at once succeeds, on every store that
can create without replacing; that a store can is found out here, by doing it.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath

from pydantic import ValidationError

from qlora_api.base import Model, Timestamp
from qlora_api.contract import JobRef
from qlora_storage.errors import AlreadyExistsError, JobError, NotFoundError, StorageError, UserError
from qlora_storage.object_store import Store, open_store
from qlora_storage.retry import PATIENCE_SECONDS

FIELD = "spec.output.destination"
FOLDER = ".claims"
TRIES = 5
"""Each lost to another claim that was created in the same moment."""
LIFETIME = timedelta(days=14)
RENEWED_AFTER = timedelta(days=1)
"""An attempt that begins later renews the claim of its job; of those before, each would be a write for nothing."""
log = logging.getLogger(__name__)


class Claim(Model):
    """One object below FOLDER."""

    run_uid: str
    namespace: str
    job: str
    cluster: str = ""
    """Cluster of the job; empty for a local run, and in claims of earlier versions, which are known by their uid
    alone."""
    time: Timestamp
    """Time at which it was made or renewed: the start of an attempt of the job."""
    released: bool = False
    """Whoever held the destination does not need it any more."""

    def to_bytes(self) -> bytes:
        """Return it as JSON; versions that know no clusters still read one without."""
        return self.model_dump_json(by_alias=True, exclude_defaults=True).encode()

    @property
    def age(self) -> timedelta:
        return datetime.now(UTC) - self.time

    def is_of(self, job: JobRef) -> bool:
        """Tell whether ``job`` may go on with this claim or in its place."""
        return self.run_uid == job.uid or self.released or self.age > LIFETIME or self.is_of_predecessor(job)

    def is_of_predecessor(self, job: JobRef) -> bool:
        """Tell whether the claim's run was the same object of the same cluster, before it was created anew."""
        same_object = (self.cluster, self.namespace, self.job) == (job.cluster, job.namespace, job.name)
        return bool(job.cluster) and same_object and self.run_uid != job.uid

    def is_current(self, job: JobRef) -> bool:
        """Tell whether the claim is this run's and need not be renewed."""
        mine = (self.run_uid, self.cluster) == (job.uid, job.cluster)
        return mine and not self.released and self.age < RENEWED_AFTER


def claim_destination(uri: str, job: JobRef) -> None:
    """Claim the destination for a job, or renew its claim; one of today stays as it is.

    Raises:
        UserError: another job has claimed it, or the store replaces objects where it should refuse to.
        StorageError: it is out of reach, or full.

    """
    store = open_store(uri, FIELD)
    for _ in range(TRIES):
        number, claim = _last(store)
        if claim and not claim.is_of(job):
            raise UserError(
                FIELD,
                store.uri(),
                f"is claimed by job {claim.namespace}/{claim.job} (run {claim.run_uid}), whose last attempt began at "
                f"{claim.time:%Y-%m-%d %H:%M} UTC, {_days(claim.age)} ago, and two jobs cannot publish to one place: "
                f"choose another destination, or delete {store.uri(FOLDER)} if that job is gone (after "
                f"{LIFETIME.days} days without a new attempt its claim expires)",
            )
        if claim and claim.is_current(job):
            _check_refusal(store, _key(number), claim)
            return
        if claim and not claim.released and claim.run_uid != job.uid:
            log.warning(
                "the claim of job %s/%s (run %s) on %s %s: its last attempt began %s ago",
                *(claim.namespace, claim.job, claim.run_uid, store.uri()),
                "passes to this job, which is in its place" if claim.is_of_predecessor(job) else "has expired",
                _days(claim.age),
            )
        if _follow(store, number, _claim_of(job)):
            return
    raise StorageError(f"{FIELD}: {store.uri(FOLDER)} changes while it is claimed: other jobs claim {uri} too")


def release_destination(uri: str, run_uid: str, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """Give the destination up, where this run has claimed it. What goes wrong is logged: the claim then stays."""
    try:
        store = open_store(uri, FIELD, patience_seconds)
        number, claim = _last(store)
        if claim and claim.run_uid == run_uid and not claim.released:
            _follow(store, number, claim.model_copy(update={"time": _now(), "released": True}))
    except JobError as error:
        log.warning("%s stays claimed: %s", uri, error)


def _days(age: timedelta) -> str:
    if age < timedelta(hours=1):
        return "less than an hour"
    if age < timedelta(days=1):
        return f"{age.seconds // 3600} hours"
    return f"{age.days} days"


def _claim_of(job: JobRef) -> Claim:
    return Claim(run_uid=job.uid, namespace=job.namespace, job=job.name, cluster=job.cluster, time=_now())


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _last(store: Store) -> tuple[int, Claim | None]:
    """Return the claim that counts, with its number; 0 and None where there is none."""
    numbers = [int(PurePosixPath(key).stem) for key, _ in store.list(FOLDER) if PurePosixPath(key).stem.isdecimal()]
    if not numbers:
        return 0, None
    key = _key(max(numbers))
    try:
        return max(numbers), Claim.model_validate_json(store.get(key))
    except NotFoundError:  # followed by another since it was listed
        return max(numbers), None
    except ValidationError as error:
        raise UserError(FIELD, store.uri(key), "is not a claim of a job; delete it") from error


def _follow(store: Store, number: int, claim: Claim) -> bool:
    """Create the claim that follows ``number``; False where another was faster."""
    key = _key(number + 1)
    try:
        store.create(key, claim.to_bytes())
    except AlreadyExistsError:
        return False  # or it is this very claim, whose answer was lost: the next look tells
    _check_refusal(store, key, claim)
    if _last(store)[0] != number + 1:  # what was listed was old: others have come and gone
        return False
    for old in range(number, 0, -1):
        if not _delete(store, _key(old)):
            break
    return True


def _delete(store: Store, key: str) -> bool:
    """Delete an earlier claim; False where there is none, or it may not be deleted. It does not count any more."""
    try:
        there = store.stat(key) is not None
        store.delete(key)
    except UserError as error:
        log.warning("%s stays behind, deleting is not allowed: %s", store.uri(key), error)
        return False
    return there


def _check_refusal(store: Store, key: str, claim: Claim) -> None:
    """Find out that a name that is taken is refused, as publishing relies on.

    Raises:
        UserError: it is replaced.

    """
    try:
        store.create(key, claim.to_bytes())
    except AlreadyExistsError:
        return
    raise UserError(
        FIELD,
        store.uri(),
        "is on a server that replaces an object where it is told to create it only (PUT with If-None-Match: *), so "
        "that two writers would both believe to have published: use a server that knows conditional writes",
    )


def _key(number: int) -> str:
    return f"{FOLDER}/{number:08d}.json"
