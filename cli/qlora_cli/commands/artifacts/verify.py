"""The command ``qlora verify``."""

from __future__ import annotations

import typer

from qlora_cli.commands import options as o
from qlora_cli.commands.artifacts.download import find_published
from qlora_cli.commands.exit_codes import CHECK_FAILED
from qlora_cli.commands.options import exit_with_code
from qlora_cli.kube.target import Target, program
from qlora_cli.text.choices import OutputFormat
from qlora_cli.text.printable import one_line, write_line


def verify(
    what: o.Published,
    *,
    secret: o.Secret = False,
    output: o.Output = OutputFormat.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Verify a published adapter against its adapter manifest.

    Compares the size and SHA-256 of every file, and reports extra files, because libraries would load them.
    """
    with exit_with_code():
        from qlora_cli.artifacts import adapters
        from qlora_cli.text import output as out

        published = find_published(what, Target(kubeconfig, context, namespace), secret=secret)
        with out.console(stderr=True).status("reading …") as status:
            problems = adapters.verify(published, status.update)
        manifest = published.folder.uri(adapters.MANIFEST)
        if output in (OutputFormat.JSON, OutputFormat.YAML):
            plain = {
                "manifest": manifest,
                "files": len(published.files),
                "verified": not problems,
                "problems": problems,
            }
            out.write_plain(plain, output)
        elif output is OutputFormat.NAME:
            write_line(manifest)
        else:
            write_line(
                "\n".join(map(one_line, problems))
                or f"{manifest}: all {len(published.files)} files are what was published"
            )
            if not problems:
                out.say_next(f"{program()} merge {what} --out merged{Target(kubeconfig, context, namespace).flags()}")
    raise typer.Exit(CHECK_FAILED if problems else 0)
