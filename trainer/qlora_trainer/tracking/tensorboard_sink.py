"""Write event files for TensorBoard: one for each attempt, in the run's folder.

An attempt's file begins with the run's first step, and its first event tells readers to drop what earlier files hold
(``SessionLog.START`` at step 0). So each step is there once, whatever an earlier attempt had written when it ended.
"""

from __future__ import annotations

import html
import io
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from qlora_storage.object_store import leaves_claim, local_path, open_store
from qlora_trainer.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from qlora_trainer.tracking.journal import StepRow
    from qlora_trainer.tracking.run_facts import RunFacts

UPLOAD_SECONDS = 30.0
"""Object storage has no appending: the file is uploaded as a whole this often. With 20,000 steps it has 10 MB."""
PROBE = ".writable"


class TensorBoardSink:
    """The event file of one attempt."""

    def __init__(self, facts: RunFacts) -> None:
        folder, field = f"{facts.sink.folder}/{facts.folder_name}", f"{facts.field}.folder"
        self._name = f"events.out.tfevents.{facts.attempt:010d}.{facts.job.name}"
        self._file: io.BytesIO | io.BufferedWriter
        store, local = open_store(folder, field), local_path(folder, field)
        self.url = store.uri()
        self._store = store if local is None else None
        self._file = io.BytesIO() if local is None else open_beside_others(local / self._name, facts)
        self._uploaded = 0.0
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._write(Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START)))
        self._text("parameters", table(facts.parameters))
        self._save()

    @staticmethod
    def check(facts: RunFacts) -> None:
        """Check that the folder can be written to.

        Raises:
            UserError: it cannot.
            StorageError: it is out of reach.

        """
        store = open_store(f"{facts.sink.folder}/{facts.folder_name}", f"{facts.field}.folder")
        store.put(PROBE, b"")
        with suppress(UserError):  # to delete may not be allowed
            store.delete(PROBE)

    def write(self, rows: Sequence[StepRow]) -> None:
        for row in rows:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in row.metrics.items()]
            self._write(Event(wall_time=row.time, step=row.step, summary=Summary(value=values)))
        if self._store is None or time.monotonic() - self._uploaded >= UPLOAD_SECONDS:
            self._save()

    def finish(self, attempts: Sequence[Mapping[str, Any]], exit_code: int, adapter: str, history: Path) -> None:  # noqa: ARG002 of other tools
        if adapter:
            self._text("adapter", adapter)
        self._save()

    def close(self) -> None:
        self._file.close()

    def _text(self, tag: str, text: str) -> None:
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=TensorShapeProto())
        value = Summary.Value(tag=tag, tensor=tensor, metadata=create_summary_metadata(tag, ""))
        self._write(Event(wall_time=time.time(), step=0, summary=Summary(value=[value])))

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())

    def _save(self) -> None:
        self._records.flush()
        if self._store is not None:
            assert isinstance(self._file, io.BytesIO)
            self._store.put(self._name, self._file.getvalue())
            self._uploaded = time.monotonic()


def open_beside_others(path: Path, facts: RunFacts) -> io.BufferedWriter:
    """Open a new file in a local folder or a mounted claim. It grows in place, as TensorBoard keeps files open.

    Raises:
        UserError: a link in the claim leads out of it.

    """
    if leaves_claim(path, path.resolve()):
        raise UserError(f"{facts.field}.folder", facts.sink.folder, "leads out of its claim by a link: choose another")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("wb")


def table(parameters: Mapping[str, str]) -> str:
    """Return a Markdown table."""
    rows = (f"| {name} | {html.escape(value).replace('|', '&#124;')} |" for name, value in parameters.items())
    return "\n".join(["| field | value |", "| --- | --- |", *(row.replace("\n", " ") for row in rows)])
