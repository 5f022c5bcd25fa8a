"""The commands for jobs in a cluster. Thin: each imports what it needs, so that ``qlora --help`` loads nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.cluster import options as o
from qlora_cli.cluster.choices import DryRun, Form
from qlora_cli.cluster.options import ends
from qlora_cli.cluster.target import Target, connect, is_local, program

Manifests = Annotated[list[Path], typer.Argument(metavar="JOB.yaml...", help="Manifests; - reads standard input.")]
Attempt = Annotated[int | None, typer.Option("--attempt", min=1, metavar="N", help="Default: the newest.")]


def submit(
    manifests: Manifests,
    overrides: o.Set = None,
    *,
    dry_run: Annotated[
        DryRun, typer.Option(help="server: have the API server check it, and create nothing.")
    ] = DryRun.NONE,
    watching: Annotated[bool, typer.Option("--watch", help="Then watch until it is over.")] = False,
    output: o.Output = Form.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Create QLoRAJobs in a cluster.

    Checks the manifests here first; a path on this machine is refused with the command that uploads it.
    """
    with ends():
        from qlora_cli.cluster import output as out
        from qlora_cli.cluster import submit as submitting

        target = Target(kubeconfig, context, namespace)
        files = [submitting.read(path, overrides or ()) for path in manifests]
        submissions = [submission for file in files for submission in file.jobs]
        submitting.require_one_namespace(submissions, namespace)
        for kind in (kind for file in files for kind in file.passed_over):
            out.note(f"passed over: {kind}; kubectl apply creates it")
        if dry_run is DryRun.CLIENT:
            created = [submission.body for submission in submissions]
        else:
            with connect(target) as cluster:
                created = [submitting.send(cluster, s, dry_run=dry_run is DryRun.SERVER) for s in submissions]
        _tell(created, output, "created" if dry_run is DryRun.NONE else f"valid (dry run by the {dry_run})")
        names = [job["metadata"]["name"] for job in created]
        if dry_run is not DryRun.NONE:
            files_again = " ".join(str(path) for path in manifests)
            out.say_next(f"{program()} submit {files_again}{target.flags()}")
            return
        if watching:
            _watch(target, tuple(names), None, everywhere=False, until_over=True)
            return
        if output is Form.TEXT:
            where = _where(target, created[0]["metadata"]["namespace"])
            out.say_next(f"{program()} watch {' '.join(names)}{where}", f"{program()} logs {names[0]} --follow{where}")


def list_jobs(
    *,
    everywhere: o.Everywhere = False,
    selector: o.Selector = None,
    local: Annotated[bool, typer.Option("--local", help="Runs on this machine.")] = False,
    runs_dir: o.RunsDir = Path("runs"),
    output: o.Output = Form.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """List jobs, or local runs.

    Where no cluster is configured, local runs are listed.
    """
    with ends():
        from datetime import UTC, datetime

        from qlora_cli.cluster import kubeconfig as config
        from qlora_cli.cluster import listing
        from qlora_cli.cluster import output as out

        target = Target(kubeconfig, context, namespace)
        local = local or not (kubeconfig or context or config.is_configured())
        if local:
            found = listing.runs_of(runs_dir)
            objects, views, where = [record for record, _ in found], [view for _, view in found], str(runs_dir)
        else:
            with connect(target) as cluster:
                objects = listing.jobs_of(cluster, everywhere=everywhere, selector=selector)
                where = "the cluster" if everywhere else f"namespace {cluster.namespace}"
            views = listing.views_of(objects)
        if output is not Form.TEXT:
            out.write_objects(objects, output)
            return
        if not views:
            out.note(f"No {'runs' if local else 'jobs'} in {where}.")
            out.say_next(f"{program()} init", f"{program()} {'run' if local else 'submit'} JOB.yaml{target.flags()}")
            return
        head, rows = listing.table(views, datetime.now(UTC), everywhere=everywhere, local=local)
        out.print_table(out.console(), head, rows, right=listing.NUMBERS, spare=listing.SPARE)
        out.say_next(listing.next_command(views, program(), target.flags()))


def show(
    job: o.Reference,
    *,
    output: o.Output = Form.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Show all that is known of a job or a local run.

    Settings, progress, attempts with their ends, memory by component, the adapter.
    """
    with ends():
        from datetime import UTC, datetime

        from qlora_cli.cluster import lookup, showing
        from qlora_cli.cluster import output as out

        target = Target(kubeconfig, context, namespace)
        found = lookup.find(target, [job])[0]
        if output is not Form.TEXT:
            out.write_objects([found.body], output, one=True)
            return
        screen = out.console()
        for line in showing.page(found.view, found.body, datetime.now(UTC), screen.width):
            screen.print(line, soft_wrap=True)
        out.say_next(*lookup.next_commands(found.view, target))


def watch(
    jobs: o.SomeNames = None,
    *,
    everywhere: o.Everywhere = False,
    selector: o.Selector = None,
    forever: Annotated[bool, typer.Option("--forever", help="Go on when the named jobs are over.")] = False,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Watch jobs live.

    Named jobs are watched until they are over: the exit code is 1 if one of them failed. Without names all jobs of the
    namespace are watched until Ctrl-C.
    """
    with ends():
        names = tuple(dict.fromkeys(jobs or ()))
        target = Target(kubeconfig, context, namespace)
        _watch(target, names, selector, everywhere=everywhere, until_over=bool(names) and not forever)


def logs(
    job: o.Reference,
    *,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Until the job is over, later attempts too.")] = False,
    attempt: Attempt = None,
    prepare: Annotated[bool, typer.Option("--prepare", help="Of the pod that prepares.")] = False,
    worker: Annotated[int | None, typer.Option(min=0, metavar="I", help="Of one pod only.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, metavar="R", help="Of one rank only.")] = None,
    tail: Annotated[int | None, typer.Option(min=0, metavar="N", help="The newest lines of each pod.")] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="Not older than 30s, 5m, 2h.")] = None,
    timestamps: Annotated[bool, typer.Option("--timestamps", help="With the time of each line.")] = False,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Print the logs of all ranks of a job as one.

    Lines are merged by time; each begins with the rank that wrote it, or with its worker where none is named.
    """
    with ends():
        from qlora_cli.cluster import tailing
        from qlora_cli.cluster.logprint import Printer, parse_since, print_local
        from qlora_cli.cluster.output import note

        if is_local(job):
            print_local(Path(job), attempt, prepare=prepare, tail=tail, follow=follow)
            return
        wanted = tailing.Wanted(
            attempt=tailing.PREPARE if prepare else attempt,
            worker=worker,
            rank=rank,
            follow=follow,
            tail=tail,
            since_seconds=parse_since(since),
            timestamps=timestamps,
        )
        with connect(Target(kubeconfig, context, namespace)) as cluster:
            lines = tailing.Follower(cluster, job, wanted).lines(note) if follow else tailing.read(cluster, job, wanted)
            printer = Printer(timestamps=timestamps)
            for line in lines:
                printer.line(line)


def events(
    job: o.Name,
    *,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="And those to come, until Ctrl-C.")] = False,
    output: o.Output = Form.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Show the events of a job, of its child Jobs and of its pods, in one list."""
    with ends():
        from datetime import UTC, datetime

        from qlora_cli.cluster import happened
        from qlora_cli.cluster import output as out
        from qlora_cli.cluster.target import get_job

        target = Target(kubeconfig, context, namespace)
        with connect(target) as cluster:
            get_job(cluster, job)
            family, screen = happened.Family(job), out.console()
            if follow:
                for event in happened.follow(cluster, family):
                    screen.print(happened.line(event), soft_wrap=True)
                return
            bodies = happened.events_of(cluster, family)
        if output is not Form.TEXT:
            out.write_objects(bodies, output, kind=out.EVENT)
            return
        rows = happened.rows([happened.see(body) for body in bodies], datetime.now(UTC))
        if not rows:
            out.note(f'No events of job "{job}"; the API server keeps them for an hour.')
        else:
            out.print_table(screen, happened.HEAD, rows)
        out.say_next(f"{program()} show {job}{target.flags()}")


def suspend(
    jobs: o.Names,
    *,
    output: o.Output = Form.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Have jobs checkpoint, free their GPUs and wait."""
    _set_suspend(Target(kubeconfig, context, namespace), jobs, output, suspend=True)


def resume(
    jobs: o.Names,
    *,
    output: o.Output = Form.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Have suspended jobs go on from their checkpoints."""
    _set_suspend(Target(kubeconfig, context, namespace), jobs, output, suspend=False)


def cancel(
    jobs: o.Names,
    *,
    yes: o.Yes = False,
    output: o.Output = Form.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Delete jobs and their pods.

    What they have published stays. A job that is to go on later is suspended instead.
    """
    with ends():
        from qlora_cli.cluster import acting
        from qlora_cli.cluster import output as out

        target = Target(kubeconfig, context, namespace)
        with connect(target) as cluster:
            found = acting.doomed(cluster, jobs)
            if not yes:
                for job in found:
                    out.note(acting.describe(job))
            if not acting.confirm(f"Delete {'it' if len(found) == 1 else f'these {len(found)}'}?", yes=yes):
                raise typer.Exit(o.NO)
            for job in found:
                acting.delete(cluster, job)
        _tell(found, output, "deleted")
        if output is Form.TEXT:
            out.say_next(f"{program()} list{target.flags()}")


def retry(
    job: o.Name,
    overrides: o.Set = None,
    *,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Of the new job; default: JOB-r2.")] = None,
    dry_run: Annotated[DryRun, typer.Option(help="As with submit.")] = DryRun.NONE,
    output: o.Output = Form.TEXT,
    namespace: o.Namespace = None,
    context: o.Context = None,
    kubeconfig: o.Kubeconfig = None,
) -> None:
    """Make a new job with a failed one's spec.

    A job that failed stays failed, as a Job of Kubernetes does; the new one has a name of its own and begins at step 0.
    What the operator retries by itself (a lost node, a crash within policy.maxRestarts) goes on from a checkpoint.
    """
    with ends():
        from qlora_cli.cluster import output as out
        from qlora_cli.cluster import submit as submitting

        target = Target(kubeconfig, context, namespace)
        with connect(target) as cluster:
            body = submitting.again(cluster, job, name, overrides or ())
            if dry_run is not DryRun.CLIENT:
                submission = submitting.Submission(body, f"retry of {job}")
                body = submitting.send(cluster, submission, dry_run=dry_run is DryRun.SERVER)
        _tell([body], output, "created" if dry_run is DryRun.NONE else f"valid (dry run by the {dry_run})")
        if output is Form.TEXT and dry_run is DryRun.NONE:
            out.say_next(f"{program()} watch {body['metadata']['name']}{target.flags()}")


# ------------------------------------------------------------------------------------------------------------- together


def _watch(target: Target, names: tuple[str, ...], selector: str | None, *, everywhere: bool, until_over: bool) -> None:
    from qlora_cli.cluster import lookup, watching
    from qlora_cli.cluster import output as out
    from qlora_cli.cluster.target import get_job

    with connect(target) as cluster:
        for name in names:
            get_job(cluster, name)
        events = watching.start(cluster, watching.Request(names, selector, everywhere))
        board = watching.Board(frozenset(names))
        place = "all namespaces" if everywhere else f"namespace {cluster.namespace}"
        title = f"{place}{f' · {cluster.context}' if cluster.context else ''}"
        watching.watch(out.console(), events, board, title, until_over=until_over)
    jobs = list(board.jobs.values())
    if len(names) == 1 and jobs:
        out.say_next(*lookup.next_commands(jobs[0], target))
    raise typer.Exit(o.NO if board.any_failed else 0)


def _set_suspend(target: Target, names: list[str], output: Form, *, suspend: bool) -> None:
    with ends():
        from qlora_cli.cluster import acting
        from qlora_cli.cluster import output as out

        with connect(target) as cluster:
            pairs = [acting.set_suspend(cluster, name, suspend=suspend) for name in dict.fromkeys(names)]
        word = "suspended" if suspend else "resumed"
        for job, changed in pairs:
            _tell([job], output, f"{word}" if changed else f"unchanged, it is {word} already")
        if output is Form.TEXT:
            command = f"{program()} watch {' '.join(names)}{target.flags()}"
            out.say_next(command, *([f"{program()} resume {' '.join(names)}{target.flags()}"] if suspend else []))


def _tell(jobs: list[dict[str, object]], output: Form, done: str) -> None:
    """``qlorajob.qlora.dev/tune created``, or the objects."""
    from qlora_cli.cluster import output as out

    if output is not Form.TEXT:
        out.write_objects(jobs, output, one=len(jobs) == 1)
        return
    sys.stdout.writelines(f"{out.name_of(job)} {done}\n" for job in jobs)
    sys.stdout.flush()


def _where(target: Target, namespace: str) -> str:
    """Flags for the next command; the manifest may have named the namespace."""
    if target.namespace is None and namespace != "default":
        return f"{target.flags()} -n {namespace}"
    return target.flags()
