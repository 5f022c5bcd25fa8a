"""Read, show, follow and change jobs in a cluster, and local runs."""
