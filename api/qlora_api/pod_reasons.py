"""Reasons that the kubelet gives why a container does not start."""

from __future__ import annotations

IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
"""The node does not get its image."""
