"""Programs and services that tests and tools start: Go tools, images, S3, Prometheus."""
