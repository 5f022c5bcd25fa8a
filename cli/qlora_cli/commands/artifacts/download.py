"""The command ``qlora download``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.options import exit_with_code
from qlora_cli.kube.target import Target, connect, is_local, program
from qlora_cli.text.printable import write_line

if TYPE_CHECKING:
    from qlora_cli.artifacts import adapters


def download(
    what: o.Published,
    *,
    to: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to write; default: the name of the job.", parser=o.to_path),
    ] = None,
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="Do not download the merged model.")] = False,
    secret: o.Secret = False,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Download a published adapter and verify it.

    Compares the size and SHA-256 of each file with the manifest, and the manifest with the job's status. Takes
    credentials for object storage from the environment. When repeated, fetches only what is missing.
    """
    with exit_with_code():
        from qlora_cli.artifacts import adapters
        from qlora_cli.text import output as out
        from qlora_cli.text import units

        published = find_published(what, Target(kubeconfig, context, namespace), secret=secret)
        folder = to or adapters.default_folder(published)
        screen = out.console(stderr=True)
        with screen.status("reading the manifest …") as status:
            count, size = adapters.download(published, folder, status.update, adapter_only=adapter_only)
        place = adapters.folder_of(published, folder)
        write_line(f"{place}: {count} files, {units.size(size)} fetched; all are what was published")
        out.say_next(f"{program()} generate --adapter {place} --prompt …", f"{program()} merge {folder}/ --out merged")


def find_published(what: str, target: Target, *, secret: bool) -> adapters.PublishedAdapter:
    """Return the manifest that a reference names."""
    from qlora_cli.artifacts import adapters
    from qlora_cli.kube.target import folder_hint, get_job

    if is_local(what) or what.endswith(adapters.MANIFEST):
        return adapters.read(adapters.source_of(what, None))
    with folder_hint([what]), connect(target) as cluster:
        job = get_job(cluster, what)
        if secret:
            adapters.use_secret(cluster, job)
        return adapters.read(adapters.source_of(what, job))
