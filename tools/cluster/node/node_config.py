"""Configuration files of a node's programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.credentials import KeyPair

CLUSTER_DOMAIN = "cluster.local"


def kubelet_config(address: str, control_group: str, authority: Path, serving: KeyPair) -> str:
    """Kubelet's configuration; paths under /run/node are as the node sees them."""
    config = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": address,
        "tlsCertFile": str(serving.certificate),
        "tlsPrivateKeyFile": str(serving.key),
        "authentication": {"anonymous": {"enabled": False}, "x509": {"clientCAFile": str(authority)}},
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "podLogsDir": "/run/node/pod-logs",
        "volumePluginDir": "/run/node/volume-plugins",
        "clusterDNS": [address],
        "clusterDomain": CLUSTER_DOMAIN,
        "resolvConf": "",
        "failCgroupV1": False,
        "failSwapOn": False,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{control_group}",
        # The machine's disk is not the node's to judge.
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "nodeStatusUpdateFrequency": "2s",
        "makeIPTablesUtilChains": False,
    }
    return json.dumps(config, indent=1)


def cni_config(pod_range: str) -> str:
    """Pods' network: each has its own link to the node, which routes.

    On a shared bridge, a reply between two pods of one node would pass by the rules that undo a Service's address.
    """
    subnet = {"subnet": pod_range}
    config = {
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [
            {"type": "ptp", "ipam": {"type": "host-local", "ranges": [[subnet]], "routes": [{"dst": "0.0.0.0/0"}]}}
        ],
    }
    return json.dumps(config, indent=1)


def coredns_config(address: str, kubeconfig: Path) -> str:
    """CoreDNS for the cluster's names, uncached; every other name does not exist, at once."""
    return f"""\
{CLUSTER_DOMAIN}:53 in-addr.arpa:53 {{
    bind {address}
    errors
    kubernetes {CLUSTER_DOMAIN} in-addr.arpa {{
        kubeconfig {kubeconfig}
        ttl 0
    }}
}}
.:53 {{
    bind {address}
    template IN ANY . {{
        rcode NXDOMAIN
    }}
}}
"""
