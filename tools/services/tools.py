"""Every Go tool the tests run, pinned. ``python tools/services/tools.py`` builds those that are missing.

Time on 2 cores, nothing cached: 10 to 12 minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from services.binaries import GoTool, find_or_build

KUBERNETES_VERSION = "v1.36.3"
_, _MINOR, _PATCH = KUBERNETES_VERSION.split(".")
_STAMP = "k8s.io/component-base/version"
_KUBERNETES_STAMPS = {"gitVersion": KUBERNETES_VERSION, "gitMajor": "1", "gitMinor": _MINOR}


def _kubernetes(name: str) -> GoTool:
    return GoTool(
        name,
        package=f"k8s.io/kubernetes/cmd/{name}",
        version=KUBERNETES_VERSION,
        module="k8s.io/kubernetes",
        staging=f"v0.{_MINOR}.{_PATCH}",
        ldflags=" ".join(("-s -w", *(f"-X {_STAMP}.{name}={value}" for name, value in _KUBERNETES_STAMPS.items()))),
    )


KUBE_APISERVER = _kubernetes("kube-apiserver")
KUBE_CONTROLLER_MANAGER = _kubernetes("kube-controller-manager")
KUBE_SCHEDULER = _kubernetes("kube-scheduler")
KUBELET = _kubernetes("kubelet")
KUBE_PROXY = _kubernetes("kube-proxy")
KUBECTL = _kubernetes("kubectl")
ETCD = GoTool("etcd", "go.etcd.io/etcd/server/v3", "v3.7.3", module="go.etcd.io/etcd/server/v3")
KWOK = GoTool("kwok", "sigs.k8s.io/kwok/cmd/kwok", "v0.8.0")
HELM = GoTool("helm", "helm.sh/helm/v4/cmd/helm", "v4.3.1")
VERSITYGW = GoTool("versitygw", "github.com/versity/versitygw/cmd/versitygw", "v1.8.0")
CONTAINERD = GoTool("containerd", "github.com/containerd/containerd/v2/cmd/containerd", "v2.4.2")
CONTAINERD_SHIM = GoTool(
    "containerd-shim-runc-v2", "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2", "v2.4.2"
)
CTR = GoTool("ctr", "github.com/containerd/containerd/v2/cmd/ctr", "v2.4.2")
COREDNS = GoTool("coredns", "github.com/coredns/coredns", "v1.13.1")
KUBECONFORM = GoTool("kubeconform", "github.com/yannh/kubeconform/cmd/kubeconform", "v0.7.0")
KUEUE = GoTool("kueue", "sigs.k8s.io/kueue/cmd/kueue", "v0.17.0")
ACTIONLINT = GoTool("actionlint", "github.com/rhysd/actionlint/cmd/actionlint", "v1.7.12")

CONTROL_PLANE = (ETCD, KUBE_APISERVER, KUBE_CONTROLLER_MANAGER, KUBE_SCHEDULER, KUBECTL, KWOK)
NODE = (CONTAINERD, CONTAINERD_SHIM, CTR, KUBELET, KUBE_PROXY, COREDNS)

if __name__ == "__main__":
    for tool in (VERSITYGW, *CONTROL_PLANE, HELM, *NODE, KUBECONFORM, ACTIONLINT):
        find_or_build(tool)
