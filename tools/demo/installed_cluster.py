"""Everything a QLoRAJob meets in a cluster, for real: control plane, nodes, images, chart, S3.

Used by the end-to-end tests and by ``make demo``.
"""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cluster.control_plane import ControlPlane, Settings
from cluster.scenarios.jobs import job_path, merged, qlora_job
from services import images
from services.binaries import find_or_build
from services.tools import HELM
from services.versitygw import VersityGateway
from testing.timeouts import PATIENCE_SECONDS

if TYPE_CHECKING:
    from cluster.api import Object
    from cluster.node.node import Node

CHART = Path(__file__).parents[2] / "charts" / "qlora-operator"
RELEASE = "qlora"
SECRET = "s3"
HELM_SECONDS = PATIENCE_SECONDS
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
HOSTILE_KEYS = {
    "PYTHONPATH": "/tmp/evil",
    "PYTHONSTARTUP": "/tmp/evil.py",
    "LD_PRELOAD": "/tmp/evil.so",
    "HTTPS_PROXY": "http://192.0.2.1:3128",
    "HTTP_PROXY": "http://192.0.2.1:3128",
    "NCCL_DEBUG_FILE": "/tmp/evil.log",
    "GLOO_SOCKET_IFNAME": "evil0",
}
"""Keys of a tenant's Secret that would run code, or send data elsewhere, if they came into a pod's environment."""
TRAINER = {
    "device": "CPU",
    "cpu": "50m",
    "memory": "3Gi",
    "sharedMemory": "64Mi",
    "cacheSizeLimit": "1Gi",
    "tmpSizeLimit": "1Gi",
    "ephemeralStorage": "1Gi",
    "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
}
"""Resources of a rank on this machine: two ranks and Prepare share two cores, and threads that spin would take all of
both."""


class InstalledCluster:
    """A cluster with the operator installed, and an S3 server beside it that pods reach. A context manager.

    Args:
        folder: for everything's data and logs.
        settings: of the control plane.

    """

    def __init__(self, folder: Path, settings: Settings | None = None) -> None:
        self.cluster = ControlPlane(folder / "cluster", settings or Settings(real_nodes=True))
        self._folder = folder
        self._owned = ExitStack()
        self.operator_image, self.trainer_image = images.build("operator"), images.build("trainer")

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._owned.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._owned.close()

    def _start(self) -> None:
        self._owned.enter_context(self.cluster)
        node = self.cluster.add_node(gpus=8)
        for image in (self.operator_image, self.trainer_image):
            node.import_image(image.archive)
        self.s3 = self._owned.enter_context(VersityGateway(self._folder / "s3", self.cluster.address))
        self.system = self.cluster.create_namespace("qlora-system", RESTRICTED)

    def add_trainer_node(self, name: str) -> Node:
        """One more real node, with 8 GPUs and the trainer's image alone."""
        node = self.cluster.add_node(name, gpus=8)
        node.import_image(self.trainer_image.archive)
        return node

    def place_new_pods(self, *, only_on: str = "", not_on: str = "") -> None:
        """Cordon nodes: pods that are there stay."""
        for node in self.cluster.api.list("/api/v1/nodes"):
            name = node["metadata"]["name"]
            closed = name == not_on or bool(only_on and name != only_on)
            self.cluster.api.patch(f"/api/v1/nodes/{name}", {"spec": {"unschedulable": closed}})

    # ------------------------------------------------------------------------------------------------------ the release

    def helm(self, *arguments: str | Path) -> str:
        """Run helm against the cluster; what it prints."""
        done = subprocess.run(
            [find_or_build(HELM), *arguments, "--kubeconfig", self.cluster.kubeconfig, "--namespace", self.system],
            capture_output=True,
            text=True,
            timeout=HELM_SECONDS,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"helm {' '.join(map(str, arguments))}: {done.stderr or done.stdout}")
        return done.stdout

    def install(self, **values: Any) -> str:
        """``helm upgrade --install``, and wait until the operator is ready; helm's notes."""
        operator, _, operator_tag = self.operator_image.name.partition(":")
        trainer, _, trainer_tag = self.trainer_image.name.partition(":")
        never = {"pullPolicy": "Never"}
        chosen: dict[str, Any] = {
            "image": {"repository": operator, "tag": operator_tag, **never},
            "progressSeconds": 2,
            "prepare": {"cpu": "50m", "memory": "3Gi"},
            **values,
            "trainer": {
                "image": {"repository": trainer, "tag": trainer_tag, **never},
                **TRAINER,
                **values.get("trainer", {}),
            },
        }
        path = self._folder / "values.json"
        path.write_text(json.dumps(chosen))
        wait = ("--wait", "--timeout", f"{HELM_SECONDS}s")
        return self.helm("upgrade", "--install", RELEASE, CHART, "--values", path, *wait)

    def uninstall(self) -> None:
        self.helm("uninstall", RELEASE, "--wait", "--timeout", f"{HELM_SECONDS}s")

    @property
    def operator_pod(self) -> Object:
        """The operator's pod as it is."""
        selector = f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/name=qlora-operator"
        (pod,) = self.cluster.api.list(f"/api/v1/namespaces/{self.system}/pods", labelSelector=selector)
        return pod

    # ------------------------------------------------------------------------------------------------------- a tenant

    def tenant(self) -> str:
        """A namespace that enforces the restricted profile, with the S3 server's credentials in a Secret; its name."""
        name = self.cluster.create_namespace("team", RESTRICTED)
        data = self.s3.environment | HOSTILE_KEYS
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET}, "stringData": data}
        self.cluster.api.create(secret, name)
        return name

    def s3_job(self, name: str, namespace: str, bucket: str, **groups: Any) -> Object:
        """A QLoRAJob of two workers on the material in a bucket. ``groups`` are merged into those of the spec."""
        spec: dict[str, Any] = {
            "model": {"source": f"{bucket}/base", "credentials": SECRET},
            "dataset": {
                "train": {"source": f"{bucket}/train.jsonl", "credentials": SECRET},
                "eval": {"source": f"{bucket}/eval.jsonl"},
                "format": "PromptCompletion",
                "maxLength": 128,
                "longRows": "Drop",
            },
            "lora": {"rank": 8},
            "training": {
                "maxSteps": 40,
                "globalBatchSize": 4,
                "microBatchSize": 2,
                "learningRate": "5e-3",
                "evaluation": {"everySteps": 20},
            },
            "parallelism": {"workers": 2, "zeroStage": 2},
            "checkpoint": {"everySteps": 10},
            "output": {"destination": f"{bucket}/adapters/{name}", "credentials": SECRET},
        }
        return qlora_job(name, namespace, **merged(spec, groups))

    def trainer_pods(self, namespace: str) -> list[Object]:
        path = f"/api/v1/namespaces/{namespace}/pods"
        return self.cluster.api.list(path, labelSelector="app.kubernetes.io/component=trainer")

    def story(self, namespace: str, name: str) -> str:
        """Return what a person would look at when a job failed: status, pods, the ends of their logs."""
        parts = [json.dumps(self.cluster.api.get(job_path(namespace, name)).get("status", {}), indent=1)]
        for pod in self.cluster.api.list(f"/api/v1/namespaces/{namespace}/pods"):
            path = f"/api/v1/namespaces/{namespace}/pods/{pod['metadata']['name']}"
            parts.append(f"{pod['metadata']['name']}: {json.dumps(pod['status'].get('containerStatuses'))}")
            try:
                parts.append(self.cluster.api.text(f"{path}/log", tailLines=40))
            except Exception as error:  # noqa: BLE001 a pod without a log is part of the story
                parts.append(str(error))
        return "\n".join(parts)
