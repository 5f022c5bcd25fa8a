"""The commands before and after a job: a manifest to begin with, rows to upload, adapters, comparisons, the doctor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_cli.cluster import options as o
from qlora_cli.cluster.choices import Form, RowFormat
from qlora_cli.cluster.options import ends
from qlora_cli.cluster.target import Target, connect, is_local, program

if TYPE_CHECKING:
    from qlora_cli.cluster import adapters


def init(
    *,
    model: Annotated[str | None, typer.Option(metavar="SOURCE", help="Base model; not given: asked.")] = None,
    data: Annotated[str | None, typer.Option(metavar="SOURCE", help="Training rows; not given: asked.")] = None,
    destination: Annotated[str | None, typer.Option(metavar="URI", help="For the adapter; not given: asked.")] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Of the job; default: from the destination.")] = None,
    form: Annotated[RowFormat, typer.Option("--format", help="Of the rows.")] = RowFormat.MESSAGES,
    credentials: Annotated[
        str | None, typer.Option(metavar="SECRET", help="Secret with the credentials of model, rows and destination.")
    ] = None,
    file: Annotated[Path, typer.Option("--file", "-f", metavar="FILE", help="To write; - is standard output.")] = Path(
        "job.yaml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a manifest to begin with, from three answers.

    Its comments are the API's documentation; what may be set besides is there as a comment with its default.
    """
    with ends():
        from qlora_cli.cluster import beginning
        from qlora_cli.cluster import output as out
        from qlora_cli.cluster.errors import ClusterError

        if str(file) != "-" and file.exists() and not force:
            raise ClusterError(f"--file {file}: is there already; --force replaces it, --file names another")
        given = {
            "model": model,
            "data": data,
            "destination": destination,
            "name": name,
            "format": form.value,
            "credentials": credentials,
        }
        ask = (lambda question: typer.prompt(question, err=True)) if sys.stdin.isatty() else None
        answers = beginning.ask(given, ask)
        text = beginning.text(answers)
        if str(file) == "-":
            sys.stdout.write(text)
            return
        file.write_text(text, encoding="utf-8")
        typer.echo(f"{file} written")
        here = any("://" not in place for place in (answers.model, answers.data, answers.destination))
        out.say_next(f"{program()} {'run' if here else 'submit'} {file}", f"{program()} explain spec")


def upload(
    source: Annotated[Path, typer.Argument(metavar="PATH", help="A file or a folder.")],
    target: Annotated[str, typer.Argument(metavar="URI", help="s3://bucket/key, gs://…, az://….")],
) -> None:
    """Copy rows or a model into object storage, where pods can read them."""
    with ends():
        from qlora_cli.cluster import output as out
        from qlora_cli.cluster import storage

        uris = storage.upload(source, target)
        sys.stdout.writelines(f"{uri}\n" for uri in uris)
        out.say_next(f"{program()} submit JOB.yaml")


def download(
    what: o.Published,
    *,
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: a folder named as the job.")] = None,
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="Leave a merged model where it is.")] = False,
    secret: o.Secret = False,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Fetch a published adapter, every byte checked.

    Sizes and SHA-256 are held against the manifest, and the manifest against the job's status. Object storage is
    reached with the environment's credentials. Called again, it fetches only what is missing.
    """
    with ends():
        from qlora_cli import words
        from qlora_cli.cluster import adapters
        from qlora_cli.cluster import output as out

        published = _published(what, Target(kubeconfig, context, namespace), secret=secret)
        folder = to or Path(str(published.body.get("job") or "adapter"))
        screen = out.console(stderr=True)
        with screen.status("reading the manifest …") as status:
            count, size = adapters.download(published, folder, status.update, adapter_only=adapter_only)
        place = adapters.folder_of(published, folder)
        typer.echo(f"{place}: {count} files, {words.size(size)} fetched; all are what was published")
        out.say_next(f"{program()} generate --adapter {place} --prompt …", f"{program()} merge {folder}/ --out merged")


def verify(
    what: o.Published,
    *,
    secret: o.Secret = False,
    output: o.Output = Form.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Hold a published adapter against its manifest.

    Every file is read and its size and SHA-256 compared; the exit code is 1 if one differs.
    """
    with ends():
        from qlora_cli.cluster import adapters
        from qlora_cli.cluster import output as out

        published = _published(what, Target(kubeconfig, context, namespace), secret=secret)
        with out.console(stderr=True).status("reading …") as status:
            problems = adapters.verify(published, status.update)
        manifest = published.folder.uri(adapters.MANIFEST)
        if output in (Form.JSON, Form.YAML):
            plain = {
                "manifest": manifest,
                "files": len(published.files),
                "verified": not problems,
                "problems": problems,
            }
            out.write_plain(plain, output)
        elif output is Form.NAME:
            typer.echo(manifest)
        else:
            typer.echo("\n".join(problems) or f"{manifest}: all {len(published.files)} files are what was published")
            if not problems:
                out.say_next(f"{program()} merge {what} --out merged{Target(kubeconfig, context, namespace).flags()}")
    raise typer.Exit(o.NO if problems else 0)


def compare(
    jobs: o.References,
    *,
    every: Annotated[bool, typer.Option("--all", help="Policy and scheduling too.")] = False,
    output: o.Output = Form.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Compare jobs and local runs: settings that differ, and how they ended."""
    with ends():
        from qlora_cli.cluster import comparing, lookup
        from qlora_cli.cluster import output as out
        from qlora_cli.cluster.errors import ClusterError

        if len(jobs) < 2:
            raise ClusterError("JOB: give at least two, names of jobs or folders of local runs (runs/NAME)")
        found = lookup.find(Target(kubeconfig, context, namespace), jobs)
        if output is Form.NAME:
            sys.stdout.writelines(f"{out.name_of(each.body)}\n" for each in found)
            return
        columns = [comparing.Column(each.view, each.body.get("spec") or {}) for each in found]
        if output is not Form.TEXT:
            out.write_plain(comparing.as_plain(columns, every=every), output)
            return
        screen = out.console()
        for line in comparing.pages(columns, screen.width if screen.is_terminal else None, every=every):
            screen.print(line, soft_wrap=True)
        if best := comparing.best(columns):
            out.say_next(f"{program()} verify {best}{Target(kubeconfig, context, namespace).flags()}")


def doctor(
    manifests: Annotated[
        list[Path] | None, typer.Argument(metavar="[JOB.yaml...]", help="Look at what these would need, too.")
    ] = None,
    *,
    output: o.Output = Form.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Find out what keeps jobs from running here, and what to do about it.

    Looks at the cluster, your rights, the CustomResourceDefinition, the operator, the admission policy, GPUs, gang
    scheduling, what jobs name, object storage, images, network policies, monitors and quotas; the exit code is 1 if
    something is wrong.
    """
    with ends():
        from importlib.metadata import version

        from qlora_cli.cluster import output as out
        from qlora_cli.cluster.doctor import findings as said
        from qlora_cli.cluster.doctor.judge import judge
        from qlora_cli.cluster.doctor.look import look

        bodies = []
        if manifests:
            from qlora_cli.cluster import submit

            bodies = [submission.body for path in manifests for submission in submit.read(path).jobs]
        with connect(Target(kubeconfig, context, namespace)) as cluster:
            findings = judge(look(cluster, bodies), version("qlora-operator"))
        bad = any(finding.level is said.Level.FAULT for finding in findings)
        if output in (Form.JSON, Form.YAML):
            out.write_plain([finding.to_json_dict() for finding in findings], output)
        elif output is Form.NAME:
            sys.stdout.writelines(f"{f.check}\n" for f in findings if f.level is said.Level.FAULT)
        else:
            screen = out.console()
            for line in said.lines(findings):
                screen.print(line, soft_wrap=True)
            out.note(said.summary(findings))
            if not bad:
                out.say_next(f"{program()} submit JOB.yaml")
    raise typer.Exit(o.NO if bad else 0)


def merge(
    what: o.Published,
    *,
    to: Annotated[Path, typer.Option("--out", metavar="DIR", help="For the merged model; new or empty.")],
    base: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Default: the base that the manifest names.")
    ] = None,
    secret: o.Secret = False,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Merge a published adapter into its base: one model in 16 bits that needs no PEFT.

    Runs the trainer (pip install 'qlora-operator[trainer]'), in host memory, on the adapter as published and verified.
    """
    with ends():
        from qlora_cli.cluster import merging
        from qlora_cli.cluster import output as out

        merging.require_trainer()
        published = _published(what, Target(kubeconfig, context, namespace), secret=secret)
        plan = merging.plan(published, base, to)
        with out.console(stderr=True).status("fetching the adapter …") as status:
            adapter = merging.fetch(published, status.update)
        code = merging.run(plan, adapter)
        if code == 0:
            typer.echo(f"{to}: {plan.base} with the adapter merged in")
            out.say_next(f"{program()} generate --adapter {adapter} --merged {to} --prompt …")
    raise typer.Exit(code)


def _published(what: str, target: Target, *, secret: bool) -> adapters.Published:
    """The manifest that a person means."""
    from qlora_cli.cluster import adapters
    from qlora_cli.cluster.target import get_job

    if is_local(what) or what.endswith(adapters.MANIFEST):
        return adapters.read(adapters.source_of(what, None))
    with connect(target) as cluster:
        job = get_job(cluster, what)
        if secret:
            adapters.use_secret(cluster, job)
        return adapters.read(adapters.source_of(what, job))
