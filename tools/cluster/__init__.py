"""A Kubernetes cluster on this machine: a real control plane, real and fake nodes."""
