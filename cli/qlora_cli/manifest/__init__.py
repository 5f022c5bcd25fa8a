"""Read, check, explain and write manifests of QLoRAJobs."""
