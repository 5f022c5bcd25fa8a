"""Commands for jobs in a cluster."""
