"""Flags and arguments that several commands share, and how commands end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.commands.exit_codes import UNREACHABLE, USER_ERROR
from qlora_cli.text.choices import OutputFormat, PlainOutputFormat
from qlora_cli.text.printable import write_line


def _names(incomplete: str) -> list[str]:
    """Names of jobs for completion; nothing where no cluster answers."""
    from qlora_cli.commands.completion import job_names

    return job_names(incomplete)


def _names_of_sweeps_too(incomplete: str) -> list[str]:
    from qlora_cli.commands.completion import job_names, sweep_names

    return [*job_names(incomplete), *sweep_names(incomplete)]


def _contexts(incomplete: str) -> list[str]:
    from qlora_cli.kube import kubeconfig

    return [name for name in kubeconfig.contexts() if name.startswith(incomplete)]


def _namespaces(incomplete: str) -> list[str]:
    from qlora_cli.commands.completion import namespaces

    return namespaces(incomplete)


def to_path(written: str | Path) -> Path:
    """Return the path that a user names, in which ``~`` is a home, also where no shell has expanded it."""
    from qlora_storage.local_paths import expand_home

    if not str(written):
        raise typer.BadParameter("is empty; name a file or folder")
    return expand_home(str(written))


Namespace = Annotated[
    str | None,
    typer.Option(
        "-n", "--namespace", metavar="NAME", help="Namespace; default: that of the context.", autocompletion=_namespaces
    ),
]
Context = Annotated[
    str | None,
    typer.Option("--context", metavar="NAME", help="Context of the kubeconfig.", autocompletion=_contexts),
]
Kubeconfig = Annotated[
    Path | None,
    typer.Option(
        "--kubeconfig", metavar="FILE", help="Kubeconfig; default: $KUBECONFIG, then ~/.kube/config.", parser=to_path
    ),
]
Output = Annotated[OutputFormat, typer.Option("-o", "--output", help="Output format.")]
PlainOutput = Annotated[PlainOutputFormat, typer.Option("-o", "--output", help="Output format.")]
Everywhere = Annotated[bool, typer.Option("-A", "--all-namespaces", help="Include all namespaces.")]
Selector = Annotated[
    str | None, typer.Option("-l", "--selector", metavar="LABELS", help="Label selector, as in kubectl.")
]
Manifest = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="Manifest of one QLoRAJob; - for standard input.")]
Name = Annotated[str, typer.Argument(metavar="JOB", help="Name of a job.", autocompletion=_names)]
Names = Annotated[list[str], typer.Argument(metavar="JOB", help="Names of jobs.", autocompletion=_names)]
NamesOfSweepsToo = Annotated[
    list[str],
    typer.Argument(metavar="JOB", help="Names of jobs or sweeps.", autocompletion=_names_of_sweeps_too),
]
SomeNames = Annotated[
    list[str] | None,
    typer.Argument(metavar="JOB", help="Names of jobs, or of one sweep.", autocompletion=_names_of_sweeps_too),
]
Reference = Annotated[
    str,
    typer.Argument(metavar="JOB", help="Name of a job, or folder of a local run (runs/NAME).", autocompletion=_names),
]
ReferenceOfSweepToo = Annotated[
    str,
    typer.Argument(
        metavar="JOB",
        help="Name of a job or sweep, or folder of a local run (runs/NAME).",
        autocompletion=_names_of_sweeps_too,
    ),
]
References = Annotated[
    list[str],
    typer.Argument(metavar="JOB", help="Names of jobs, or folders of local runs (runs/NAME).", autocompletion=_names),
]
Published = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="Name of a job, folder of a local run, published folder, or URI of an adapter manifest.",
        autocompletion=_names,
    ),
]
Yes = Annotated[bool, typer.Option("-y", "--yes", help="Do not ask for confirmation.")]
RunsDir = Annotated[Path, typer.Option(metavar="DIR", help="Folder of the local runs.", parser=to_path)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Set a field, such as training.maxSteps=10; null removes it. Can be repeated.",
    ),
]
Secret = Annotated[
    bool,
    typer.Option("--secret", help="Use the credentials in the job's Secret; you must be allowed to read it."),
]


def exit_with_code() -> AbstractContextManager[None]:
    """Print an error of a command that asks a cluster to standard error, and exit with its code."""
    return _exit(_cluster_code)


def exit_on_user_error() -> AbstractContextManager[None]:
    """Print an error of a command that needs no cluster to standard error, and exit with the code of a user's error."""
    return _exit(_local_code)


@contextmanager
def _exit(code_of: Callable[[ValueError], int | None]) -> Iterator[None]:
    """Print an error and exit with its code; one that has no code is a bug, which must be seen."""
    try:
        yield
    except ValueError as error:
        code = code_of(error)
        if code is None:
            raise
        write_line("; ".join([str(error), *getattr(error, "__notes__", ())]), error=True)
        raise typer.Exit(code) from None


def _cluster_code(error: ValueError) -> int | None:
    """Return the exit code of an error of the cluster, of a name, or of a manifest."""
    from qlora_cli.kube.errors import ClusterError, ConfigError, UnreachableError

    if isinstance(error, (UnreachableError, ConfigError)):
        return UNREACHABLE
    if isinstance(error, ClusterError):
        return USER_ERROR
    if "qlora_api.errors" not in sys.modules:
        return None
    from qlora_api.errors import FieldError, ManifestError
    from qlora_cli.manifest.job_manifest import RefusedError

    return USER_ERROR if isinstance(error, (FieldError, ManifestError, RefusedError)) else None


def _local_code(error: ValueError) -> int | None:
    """Return the code of a user's error, as all errors with a text are; one of pydantic is about our own objects."""
    from pydantic import ValidationError

    return None if isinstance(error, ValidationError) else USER_ERROR
