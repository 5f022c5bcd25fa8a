"""Names of environment variables that the operator sets in trainer pods and the trainer reads."""

from __future__ import annotations

WORKLOAD_IDENTITY = "QLORA_WORKLOAD_IDENTITY"
"""``true``: where a job names no credentials, requests to object storage are signed with the cloud identity of the pod
or of the machine. Anything else: they are not, and no metadata service is asked."""
