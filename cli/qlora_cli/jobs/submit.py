"""Check the jobs and sweeps of a manifest and create them in a cluster."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_api.errors import FieldError
from qlora_api.spec import REMOTE_SCHEMES
from qlora_cli.jobs.job_view import view
from qlora_cli.kube.errors import ClusterError, KubeApiError
from qlora_cli.kube.names import LONGEST_NAME, RETRY_ANNOTATION, jobs_path, sweeps_path
from qlora_cli.kube.target import get_job, is_sweep, program
from qlora_cli.manifest import crd_schema, job_manifest, sweep_manifest
from qlora_cli.manifest.job_manifest import Located, RefusedError
from qlora_cli.manifest.local_paths import places
from qlora_cli.text import kubernetes_yaml
from qlora_storage.backend import BUCKET_SCHEMES
from qlora_storage.local_paths import uri_problem, without_password

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from qlora_cli.kube.api_client import Object
    from qlora_cli.kube.target import Cluster
    from qlora_cli.text.kubernetes_yaml import Document

_SERVER_SET = ("uid", "resourceVersion", "generation", "creationTimestamp", "managedFields", "ownerReferences")
_RETRY = re.compile(r"(.*?)-r(\d+)")


@dataclass(frozen=True)
class Submission:
    """One job or sweep of a file, checked."""

    body: Object
    origin: str
    """``file:line``."""


@dataclass(frozen=True)
class ManifestJobs:
    """Jobs and sweeps of a manifest, and the documents that are ignored: those of other kinds."""

    jobs: tuple[Submission, ...]
    ignored: tuple[str, ...]
    sweeps: tuple[Submission, ...] = ()


def read_manifest(path: Path, assignments: Sequence[str] = ()) -> ManifestJobs:
    """Check all jobs and sweeps of a file as the API server would, and that they name no local path.

    Raises:
        RefusedError: every error, with file and line.

    """
    return _read_documents(job_manifest.documents(path), str(path), assignments)


def read_manifest_text(text: str, source: str, assignments: Sequence[str] = ()) -> ManifestJobs:
    """Check all jobs and sweeps of a text; ``source`` names it in messages.

    Raises:
        RefusedError: every error, with its line.

    """
    return _read_documents(kubernetes_yaml.read(text, source), source, assignments)


def _read_documents(documents: Sequence[Document], source: str, assignments: Sequence[str]) -> ManifestJobs:
    jobs: list[Submission] = []
    sweeps: list[Submission] = []
    ignored: list[str] = []
    errors: list[Located | str] = []
    for document in documents:
        if job_manifest.is_foreign(document):
            ignored.append(_title(document))
            continue
        try:
            if sweep_manifest.is_sweep(document):
                sweeps.append(_sweep(document, assignments))
            else:
                jobs.append(_job(document, assignments))
        except RefusedError as error:
            errors += error.errors
    if not (jobs or sweeps or errors):
        errors.append(f"{source}: holds no QLoRAJob, only {', '.join(ignored)}")
    if errors:
        raise RefusedError(*errors)
    return ManifestJobs(tuple(jobs), tuple(ignored), tuple(sweeps))


def _job(document: Document, assignments: Sequence[str]) -> Submission:
    """Check a job.

    Raises:
        RefusedError: every error, with its line.

    """
    overrides = [job_manifest.parse_override(text) for text in assignments]
    job_manifest.check(document, overrides)
    body = _body(document, overrides, crd_schema.root())
    return _without_local_paths(document, body, _local_paths(body["spec"]))


def _sweep(document: Document, assignments: Sequence[str]) -> Submission:
    """Check a sweep.

    Raises:
        RefusedError: every error, with its line.

    """
    overrides = [sweep_manifest.parse_override(text) for text in assignments]
    sweep_manifest.check(document, overrides)
    body = _body(document, overrides, crd_schema.sweep_root())
    job = sweep_manifest.template_job(body)
    return _without_local_paths(document, body, sweep_manifest.in_template(_local_paths(job["spec"])))


def _without_local_paths(document: Document, body: Object, local: Iterable[FieldError]) -> Submission:
    """Return what is sent.

    Raises:
        RefusedError: it names paths on this machine.

    """
    if errors := [Located(f"{document.source}:{document.line_of(error.field)}", error) for error in local]:
        raise RefusedError(*errors)
    return Submission(body, f"{document.source}:{document.line}")


def _title(document: Document) -> str:
    value: Any = document.value
    name = value.get("metadata", {}).get("name", "") if isinstance(value.get("metadata"), dict) else ""
    return f"{value['kind']} {name}".rstrip()


def _body(document: Document, overrides: Sequence[job_manifest.Override], schema: crd_schema.Schema) -> Object:
    """Return the manifest as written, without defaults: the API server sets those."""
    written = job_manifest.overridden(document.value, overrides)  # type: ignore[arg-type]
    body: Object = crd_schema.without_nulls(written, schema)
    body.pop("status", None)
    for name in _SERVER_SET:
        body["metadata"].pop(name, None)
    return body


def _local_paths(spec: Object) -> Iterator[FieldError]:
    """Yield an error for each field that names a path on this machine, with the command that uploads it."""
    bucket = _bucket(spec)
    for field, value in places(spec):
        if problem := uri_problem(value):
            yield FieldError(field, without_password(value), problem)
        if problem or value.partition("://")[0] in REMOTE_SCHEMES:
            continue
        path = value.removeprefix("file://")
        target = f"{bucket}/{Path(path).name}"
        if field == "spec.output.destination":
            remedy = f"name a folder in object storage, such as {bucket}/{Path(path).name}"
        else:
            remedy = f"upload it ({program()} upload {path} {target}) and name {target}"
        yield FieldError(
            field, value, f"is a path on this machine, where no pod can read it; {remedy}, or use 'qlora run'"
        )


def _bucket(spec: Object) -> str:
    """Return the bucket of the job's destination, or a placeholder."""
    destination = str((spec.get("output") or {}).get("destination", ""))
    scheme, separator, rest = destination.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}" if separator and scheme in BUCKET_SCHEMES else "s3://BUCKET"


def require_one_namespace(submissions: Sequence[Submission], flag: str | None) -> None:
    """Check that the manifest and the flag name the same namespace.

    Raises:
        ClusterError: they name different ones.

    """
    for submission in submissions:
        named = submission.body["metadata"].get("namespace")
        if flag and named and named != flag:
            raise ClusterError(
                f'{submission.origin}: metadata.namespace: "{named}" is not --namespace {flag}; give one of the two'
            )


# -------------------------------------------------------------------------------------------------------------- sending


def send(cluster: Cluster, submission: Submission, *, dry_run: bool) -> Object:
    """Create a job or a sweep.

    Raises:
        ClusterError: it exists already, or the API server refuses it; each cause with the file's line.

    """
    meta = submission.body["metadata"]
    namespace = meta.get("namespace") or cluster.namespace
    path = sweeps_path if is_sweep(submission.body) else jobs_path
    try:
        return cluster.api.create(path(namespace), submission.body, dry_run=dry_run)
    except KubeApiError as error:
        if error.reason == "AlreadyExists" and is_sweep(submission.body):
            raise ClusterError(_sweep_exists(namespace, meta["name"])) from None
        if error.reason == "AlreadyExists":
            raise ClusterError(_exists(cluster, namespace, meta["name"])) from None
        lines = "\n".join(f"{submission.origin}: {line}" for line in str(error).splitlines())
        raise ClusterError(lines) from None


def _exists(cluster: Cluster, namespace: str, name: str) -> str:
    try:
        state = view(cluster.api.get(jobs_path(namespace, name))).state
    except ClusterError:
        state = "there"
    flag = f" -n {namespace}" if namespace != "default" else ""
    return (
        f'metadata.name: "{name}" is taken in namespace {namespace} by a job that is {state}; take another name '
        f"(--set metadata.name={next_name(name)}), or '{program()} cancel {name}{flag}' first. What may change in a "
        "job that is there (policy, scheduling), kubectl apply changes"
    )


def _sweep_exists(namespace: str, name: str) -> str:
    flag = f" -n {namespace}" if namespace != "default" else ""
    return (
        f'metadata.name: "{name}" is taken in namespace {namespace} by a sweep; take another name '
        f"(--set metadata.name=NAME), or '{program()} cancel qlorasweep/{name}{flag}' first. What may change in a "
        "sweep that is there (limits, suspend), kubectl apply changes"
    )


# ------------------------------------------------------------------------------------------------ retrying a failed job


def retry_job(cluster: Cluster, name: str, new_name: str | None, assignments: Sequence[str]) -> Object:
    """Return a new job with the spec of a failed one.

    It starts at step 0: checkpoints belong to the job that wrote them.

    Raises:
        ClusterError: the job has not failed.
        RefusedError: what was set makes no valid job.

    """
    old = get_job(cluster, name)
    earlier = view(old)
    if earlier.state == "Succeeded" and not any(
        a.startswith(("output.destination=", "spec.output.destination=")) for a in assignments
    ):
        raise ClusterError(
            f'job "{name}" succeeded, and its destination holds its adapter; to train again, give another place: '
            "--set output.destination=…"
        )
    if not earlier.is_finished:
        raise ClusterError(
            f'job "{name}" is {earlier.state} ({earlier.reason}) and is retried by the operator itself; '
            f"'{program()} cancel {name}' ends it"
        )
    body = copy.deepcopy({"apiVersion": old["apiVersion"], "kind": old["kind"], "spec": old["spec"]})
    body["spec"]["suspend"] = False
    meta = old["metadata"]
    annotations = {
        k: v for k, v in (meta.get("annotations") or {}).items() if not k.startswith("kubectl.kubernetes.io/")
    }
    body["metadata"] = {
        "name": new_name or _free_name(cluster, name),
        "namespace": meta["namespace"],
        "annotations": {**annotations, RETRY_ANNOTATION: name},
        **({"labels": meta["labels"]} if meta.get("labels") else {}),
    }
    return job_manifest.overridden(body, [job_manifest.parse_override(text) for text in assignments])


def next_name(name: str) -> str:
    """Return the next name in ``tune``, ``tune-r2``, ``tune-r3``, …, within the API's length limit."""
    found = _RETRY.fullmatch(name)
    base, number = (found[1], int(found[2]) + 1) if found else (name, 2)
    suffix = f"-r{number}"
    return f"{base[: LONGEST_NAME - len(suffix)].rstrip('-')}{suffix}"


def _free_name(cluster: Cluster, name: str) -> str:
    taken = {item["metadata"]["name"] for item in cluster.api.list(jobs_path(cluster.namespace))[0]}
    while name in taken:
        name = next_name(name)
    return name
