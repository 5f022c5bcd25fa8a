"""Rows of Parquet and Arrow files, by way of a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qlora_trainer.data.rows.errors import RowsError
from qlora_trainer.data.rows.json_rows import check_row
from qlora_trainer.data.rows.limits import MOST_ROW_BYTES
from qlora_trainer.python_process import environment_without_credentials, python_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import IO

    from qlora_trainer.data.rows.json_rows import JsonRow
    from qlora_trainer.data.rows.source import SourceFile

MODULE = "qlora_trainer.data.rows.arrow_worker"
LINE_BYTES = 4 * MOST_ROW_BYTES + 1024
"""The worker counts characters."""


def read_arrow(
    files: Sequence[SourceFile], columns: Sequence[str], require: Callable[[SourceFile, list[str]], None]
) -> Iterator[tuple[SourceFile, JsonRow]]:
    """Read the wanted columns of all rows, as (file, row).

    Args:
        files: to be read, in this order.
        columns: that are read where a file has them.
        require: called with each file and its columns; may raise.

    Raises:
        RowsError: names the file and the row.

    """
    if not files:
        return
    request = {"files": [(str(f.path), f.device, f.inode, f.size) for f in files], "columns": list(columns)}
    file = files[0]
    with _worker(request) as lines:
        while line := lines.readline(LINE_BYTES):
            what, *rest = _parsed(line, file)
            if what == "problem":
                number, row, problem = rest
                file = files[number]
                _check(file)  # what has changed meanwhile may look damaged
                where = f"{file.name}, row {row}" if row else file.name
                raise RowsError(f"{where}: {problem}")
            if what == "file":
                _check(file)
                file = files[rest[0]]
                require(file, rest[1])
            else:
                number, done, cells = rest
                where = f"row {number}"
                checked = check_row(cells, file.name, where, suspicious=False)
                yield file, (where, checked, len(line), done)
        _check(file)


def _check(file: SourceFile) -> None:
    with file.open():  # compares what is there with what was found
        pass


def _parsed(line: bytes, file: SourceFile) -> list[Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RowsError(f"{file.name}: is nested too deep or has a number that is too long") from error
    return list(found)


@contextmanager
def _worker(request: dict[str, Any]) -> Iterator[IO[bytes]]:
    """Start the process and give its output; when left early it is killed.

    Raises:
        RowsError: it died.

    """
    environment = environment_without_credentials()
    environment["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # others reserve more than the limit
    environment["PYTHONUTF8"] = "1"
    process = subprocess.Popen(
        [*python_command(), "-m", MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin:
            process.stdin.write(json.dumps(request).encode())
        yield process.stdout
        if code := process.wait():
            raise RowsError(f"cannot be read: its reader ended with {_ending(code)}; the file is damaged, or too large")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
