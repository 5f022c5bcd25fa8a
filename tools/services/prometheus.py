"""A real Prometheus on loopback, and promtool. Debian's: version 2.42, which reads whatever a newer one also reads."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx

from cluster.processes import ServerProcess
from services.binaries import ToolMissingError
from testing.ports import free_port
from testing.timeouts import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

READY_SECONDS = PATIENCE_SECONDS
PROMTOOL_SECONDS = PATIENCE_SECONDS
POLL_SECONDS = 0.05
SCRAPE_INTERVAL = "200ms"
"""Interval of scrapes for which the configuration sets none, and of the evaluation of rules."""


class PromtoolError(Exception):
    """promtool refused; the text is what it says."""


@dataclass(frozen=True)
class Sample:
    """One element of an instant vector."""

    labels: Mapping[str, str]
    """With the metric's name as ``__name__``, where there is one."""
    value: float


class Prometheus:
    """One server. A context manager.

    Args:
        folder: for configuration, data and the log; made if missing.
        scrape_configs: as under ``scrape_configs`` in Prometheus' configuration; ``scrape`` makes one for known
            addresses. Debian builds it without ``kubernetes_sd_configs``; where pods come and go, the test keeps a file
            for ``file_sd_configs``, which Prometheus watches.
        rule_files: recording and alerting rules.

    """

    def __init__(
        self, folder: Path, scrape_configs: Sequence[Mapping[str, Any]], rule_files: Sequence[Path] = ()
    ) -> None:
        self._binary = _find("prometheus")
        self._folder = folder.absolute()
        self._config = {
            "global": {"scrape_interval": SCRAPE_INTERVAL, "evaluation_interval": SCRAPE_INTERVAL},
            "rule_files": [str(path.absolute()) for path in rule_files],
            "scrape_configs": list(scrape_configs),
        }
        self._process: ServerProcess | None = None
        self.url = ""

    def start(self) -> None:
        """Start the server and wait until it answers queries.

        Raises:
            ComponentError: it ends, such as for a wrong configuration, or is not ready in time.

        """
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / "prometheus.yml"
        config.write_text(json.dumps(self._config, indent=1))
        self.url = f"http://127.0.0.1:{free_port()}"
        self._process = ServerProcess(
            "prometheus",
            [
                *(self._binary, f"--config.file={config}", f"--storage.tsdb.path={self._folder / 'data'}"),
                *(f"--web.listen-address={self.url.removeprefix('http://')}", "--log.level=warn"),
            ],
            self._folder,
        )
        try:
            self._process.wait_until(self._is_ready, READY_SECONDS)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop it and remove its data."""
        if self._process is not None:
            self._process.kill()
            self._process = None
        shutil.rmtree(self._folder / "data", ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def query(self, expression: str) -> list[Sample]:
        """Evaluate an expression now; the vector, or a scalar as one sample without labels.

        Raises:
            ValueError: Prometheus does not understand it.

        """
        found = self._get("query", query=expression)
        if found["resultType"] == "scalar":
            return [Sample({}, float(found["result"][1]))]
        return [Sample(one["metric"], float(one["value"][1])) for one in found["result"]]

    def wait_for(self, expression: str, seconds: float = 15) -> list[Sample]:
        """Evaluate an expression, such as a comparison, until its vector is not empty.

        Raises:
            TimeoutError: it stays empty; with what was scraped meanwhile.

        """
        deadline = time.monotonic() + seconds
        while not (found := self.query(expression)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{expression}: nothing after {seconds:g} s; targets: {self.targets()}")
            time.sleep(POLL_SECONDS)
        return found

    def targets(self) -> list[dict[str, Any]]:
        """Return the targets of its API: ``scrapeUrl``, ``health``, ``lastError``, ``labels`` …."""
        return list(self._get("targets", state="active")["activeTargets"])

    def alerts(self) -> list[dict[str, Any]]:
        """Pending and firing alerts, as its API shows them: ``labels``, ``annotations``, ``state`` …."""
        return list(self._get("alerts")["alerts"])

    def _get(self, what: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{what}", params=parameters, trust_env=False)
        body = answer.json()
        if body["status"] != "success":
            raise ValueError(f"{parameters}: {body['error']}")
        return body["data"]

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=1, trust_env=False).is_success
        except httpx.TransportError:
            return False


def scrape(job: str, *addresses: str, **more: Any) -> dict[str, Any]:
    """Scrape configuration for ``host:port`` addresses that are known."""
    return {"job_name": job, "static_configs": [{"targets": list(addresses)}], **more}


def promtool(*arguments: str | Path, stdin: str = "") -> str:
    """Run promtool, as in ``promtool("check", "rules", path)``; what it prints.

    Raises:
        PromtoolError: it finds something wrong.
        ToolMissingError: it is not installed.

    """
    done = subprocess.run(
        [_find("promtool"), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PROMTOOL_SECONDS,
        check=False,
    )
    if done.returncode:
        raise PromtoolError(f"promtool {' '.join(map(str, arguments))}:\n{done.stdout}{done.stderr}")
    return done.stdout


def _find(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise ToolMissingError(f"no {name} on PATH: .ci/system-packages installs it")
    return found
