"""The client of a cluster's QLoRAJobs: the same code as the commands'."""

from __future__ import annotations

import json
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qlora_cli.artifacts import adapters
from qlora_cli.jobs import compare, submit
from qlora_cli.jobs.job_view import JobView, view
from qlora_cli.jobs.lookup import find_in
from qlora_cli.kube.errors import ClusterError as QLoRAError
from qlora_cli.kube.names import API_VERSION, KIND, jobs_path
from qlora_cli.kube.target import Cluster, Target, connect, get_job

__all__ = ["JobView", "QLoRAClient", "QLoRAError"]

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


class QLoRAClient:
    """A cluster's QLoRAJobs, of one namespace. A context manager, or closed by ``close``.

    Args:
        namespace: default: the context's.
        context: of the kubeconfig; default: the current one.
        kubeconfig: default: $KUBECONFIG, then ~/.kube/config; in a pod, its service account.

    Raises:
        QLoRAError: no way to a cluster is configured.

    """

    def __init__(
        self, namespace: str | None = None, *, context: str | None = None, kubeconfig: str | Path | None = None
    ) -> None:
        target = Target(Path(kubeconfig) if kubeconfig else None, context, namespace)
        self._owned = ExitStack()
        self._cluster: Cluster = self._owned.enter_context(connect(target))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._owned.close()

    @property
    def namespace(self) -> str:
        return self._cluster.namespace

    def submit(
        self,
        job: str | Path | Mapping[str, Any],
        settings: Mapping[str, object] | None = None,
        *,
        dry_run: bool = False,
    ) -> JobView:
        """Create a job from a manifest's file, or from a manifest as a dict.

        Args:
            job: with exactly one QLoRAJob.
            settings: fields to set, such as ``{"lora.rank": 32}``; None unsets one.
            dry_run: have the API server check it, and create nothing.

        Raises:
            QLoRAError: the API server refuses it.
            qlora_cli.manifest.job_manifest.RefusedError: every error in it.

        """
        assignments = [f"{path}={_assigned(value)}" for path, value in (settings or {}).items()]
        if isinstance(job, str | Path):
            found = submit.read_manifest(Path(job), assignments)
        else:
            text = json.dumps({"apiVersion": API_VERSION, "kind": KIND, **job})
            found = submit.read_manifest_text(text, "the manifest", assignments)
        if len(found.jobs) != 1:
            raise QLoRAError(f"{job}: holds {len(found.jobs)} QLoRAJobs; submit takes exactly one")
        return view(submit.send(self._cluster, found.jobs[0], dry_run=dry_run))

    def get(self, name: str) -> JobView:
        """Return one job, as it is now.

        Raises:
            QLoRAError: there is none of this name.

        """
        return view(get_job(self._cluster, name))

    def list(self, selector: str | None = None) -> list[JobView]:
        """Return all jobs, or those with labels as kubectl selects them."""
        items, _ = self._cluster.api.list(jobs_path(self.namespace), labelSelector=selector)
        return [view(item) for item in items]

    def follow(self, name: str) -> Iterator[JobView]:
        """Yield the job now and after every change, until it is over or deleted. What breaks off is taken up again.

        Raises:
            QLoRAError: there is none of this name.

        """
        get_job(self._cluster, name)
        for event in self._cluster.api.follow(jobs_path(self.namespace), fieldSelector=f"metadata.name={name}"):
            if event.kind == "DELETED" or (event.kind == "LISTED" and not event.items):
                return
            for body in event.items:
                job = view(body)
                yield job
                if job.is_finished:
                    return

    def metrics(self, jobs: Sequence[str]) -> Any:
        """Final figures of jobs, and of local runs by their folder (runs/NAME), a row each.

        Returns:
            A ``pandas.DataFrame`` indexed by job where pandas is installed, else a dict of dicts.

        """
        columns = [
            compare.ComparedJob(found.view, found.body.get("spec") or {}) for found in find_in(self._cluster, jobs)
        ]
        rows = {column.job.place: _numbers(compare.figures_of(column)) for column in columns}
        try:
            pandas: Any = import_module("pandas")
        except ImportError:
            return rows
        return pandas.DataFrame.from_dict(rows, orient="index")

    def adapter(self, name: str, to: str | Path) -> Path:
        """Fetch a job's adapter, verify it, and return its folder. Object storage is reached as the environment says.

        Raises:
            QLoRAError: it has none yet, or it is not what was published.

        """
        published = adapters.read(adapters.source_of(name, get_job(self._cluster, name)))
        adapters.download(published, Path(to), lambda _: None, adapter_only=True)
        return adapters.folder_of(published, Path(to))


def _assigned(value: object) -> str:
    """As after ``--set PATH=``."""
    return value if isinstance(value, str) else json.dumps(value)


def _numbers(figures: dict[str, object]) -> dict[str, object]:
    """Decimals of the API as numbers, to be reckoned with."""
    decimals = ("loss", "evalLoss", "bestEvalLoss", "tokensPerSecond")
    return {
        name: float(value) if name in decimals and isinstance(value, str) else value for name, value in figures.items()
    }
