"""``qlora run``: find out what to do, say it, do it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_api.batch import split_batch
from qlora_api.errors import FieldError
from qlora_cli.local import attempt_loop, local_spec, machine, run_folder, run_view
from qlora_cli.local.trainer_process import Commands, cache_dir, stop_on_signals
from qlora_cli.manifest import job_manifest as manifest
from qlora_storage.destination_claim import release_destination
from qlora_storage.errors import JobError, NotFoundError
from qlora_storage.object_store import is_place_in, open_store

if TYPE_CHECKING:
    from rich.console import Console

    from qlora_api.job import QLoRAJob
    from qlora_api.spec import QLoRAJobSpec
    from qlora_api.status import Adapter
    from qlora_cli.local.machine import Machine, World
    from qlora_cli.local.run_folder import RunFolder, RunRecord

MANIFEST = "manifest.json"
PATIENCE_SECONDS = 20.0
"""Longest time for which a command retries while object storage is unreachable."""


@dataclass(frozen=True)
class RunRequest:
    """The command line of one call."""

    manifest: Path
    runs_dir: Path = Path("runs")
    ranks: int | None = None
    fresh: bool = False
    overrides: tuple[str, ...] = ()


def run(request: RunRequest, console: Console, commands: Commands, here: Machine | None = None) -> int:
    """Run or resume a job on this machine; the exit code of the call.

    Raises:
        RefusedError, ManifestError, FieldError: the manifest cannot be run here.
        RunError: the run is in use, another one, or damaged.

    """
    job = manifest.one_job(request.manifest, request.overrides)
    here = here or machine.look()
    world = machine.choose_world(here, request.ranks)
    spec = local_spec.localize(job.spec, Path.cwd())
    job = job.model_copy(update={"spec": spec})
    require_even_split(job.spec, world)
    if here.note:
        console.print(f"Note: {here.note}", soft_wrap=True)
    with run_folder.locked(request.runs_dir, job.metadata.name) as lock:
        folder = run_folder.RunFolder(request.runs_dir.absolute() / job.metadata.name)
        record = _open(folder, job, console, fresh=request.fresh)
        if record.result is not None:
            require_adapter(record.name, record.result.adapter)
            console.print(run_view.result(record, attempt_loop.next_commands(folder.path)), crop=False)
            return 0
        record = record.model_copy(update={"device": world.device})
        folder.write(record)
        setting = attempt_loop.AttemptSettings(job, world, folder, cache_dir(), commands, lock, console)
        batch = attempt_loop.next_choice(setting, record).batch
        console.print(run_view.plan(record, spec, world, batch, folder.path), crop=False)
        with stop_on_signals() as stop:
            return attempt_loop.LocalRun(setting, record, stop).run()


def require_adapter(name: str, adapter: Adapter | None) -> None:
    """Check that the adapter of a finished run is still there; in object storage that is not looked at.

    Raises:
        RunError: it is gone.

    """
    if adapter and "://" not in adapter.manifest_uri and not Path(adapter.manifest_uri).exists():
        raise run_folder.RunError(
            f"run {name} was done, but {adapter.manifest_uri} is gone; train it again with --fresh"
        )


def require_even_split(spec: QLoRAJobSpec, world: World) -> None:
    """Refuse ranks that cannot share the global batch, and name numbers that can."""
    try:
        split_batch(spec, world.ranks)
    except FieldError as error:
        fitting = [n for n in range(world.ranks, 0, -1) if _splits(spec, n)]
        hint = f", or pass --ranks {fitting[0]}" if fitting else ""
        raise FieldError(error.field, error.value, f"{error.allowed}{hint}") from None


def _splits(spec: QLoRAJobSpec, ranks: int) -> bool:
    try:
        split_batch(spec, ranks)
    except FieldError:
        return False
    return True


def _open(folder: RunFolder, job: QLoRAJob, console: Console, *, fresh: bool) -> RunRecord:
    """Return the record to go on with; a new one where there is none, or it is put aside."""
    name, spec = job.metadata.name, job.spec
    folder.require_not(run_folder.SWEEP_RECORD, "a sweep")
    if fresh:
        check_destination(folder, spec)
        put_manifest_aside(folder, spec.output.destination, console)
    record = None if fresh else read_record(folder)
    trained = run_folder.trained(record) or folder.has_checkpoints()
    match run_folder.opening(record, spec, trained=trained):
        case run_folder.Refuse(changed):
            lines = "\n".join(f"  {change}" for change in changed)
            raise run_folder.RunError(
                f"{folder.path} holds a run of another spec, and a resumed run must match its checkpoint:\n{lines}\n"
                "Use another metadata.name, or --fresh to put that run aside and start anew."
            )
        case run_folder.ResumeRun(found) | run_folder.AlreadyFinished(found):
            return found
        case run_folder.StartNew():
            check_destination(folder, spec)
            if folder.path.exists():
                release_claim(folder)
                console.print(
                    f"The folder of an earlier run is now {folder.move_aside(run_folder.now())}", soft_wrap=True
                )
            return run_folder.new_record(name, spec, run_folder.now())


def check_destination(folder: RunFolder, spec: QLoRAJobSpec) -> None:
    """Refuse to publish into the run's own folder, which moves as a whole when the run starts anew.

    Raises:
        RunError: the destination is in it.

    """
    if is_place_in(spec.output.destination, str(folder.path), "spec.output.destination"):
        raise run_folder.RunError(
            f'spec.output.destination: "{spec.output.destination}" must not be in the run\'s own folder, {folder.path},'
            " which is put aside as a whole when the run starts anew; choose a folder beside it"
        )


def put_manifest_aside(folder: RunFolder, destination: str, console: Console) -> None:
    """Rename the manifest that the run before has published to the same destination, and say so; its adapter stays.

    Raises:
        RunError: the destination cannot be read or written.

    """
    try:
        earlier = folder.read()
    except run_folder.RunError:  # unreadable; whose manifest that is cannot be told
        return
    try:
        store = open_store(destination, "spec.output.destination", PATIENCE_SECONDS)
        data = store.get(MANIFEST)
        if earlier is None or json.loads(data).get("runUid") != earlier.uid:
            return  # not ours: the trainer says whose it is
        kept = f"manifest-{earlier.uid[:8]}.json"
        store.put(kept, data)
        store.delete(MANIFEST)
    except (NotFoundError, ValueError, AttributeError):
        return
    except JobError as error:
        raise run_folder.RunError(str(error)) from None
    console.print(
        f"--fresh replaces what run {earlier.uid[:8]} has published: {store.uri(MANIFEST)} is now {kept}, and "
        "its files stay where they are",
        soft_wrap=True,
    )


def release_claim(folder: RunFolder) -> None:
    """Release the destination that the run in a folder has claimed, which is put aside and does not go on."""
    try:
        earlier = folder.read()
    except run_folder.RunError:  # unreadable; which destination that is cannot be told
        return
    if earlier is not None:
        release_destination(earlier.spec.output.destination, earlier.uid, PATIENCE_SECONDS)


def read_record(folder: RunFolder) -> RunRecord | None:
    """Return a run's record, with the end of an attempt that nobody saw end."""
    record = folder.read()
    if record is None or not record.attempts or record.attempts[-1].end_time is not None:
        return record
    step = folder.attempt(record.attempts[-1].number)
    return run_folder.close_orphaned_attempt(record, step.termination_message(), _last_sign_of_life(step))


def _last_sign_of_life(step: run_folder.ProcessFiles) -> datetime:
    times = [path.stat().st_mtime for path in (step.termination, step.log, step.config) if path.exists()]
    return datetime.fromtimestamp(max(times), UTC) if times else run_folder.now()
