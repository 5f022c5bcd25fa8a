"""Report to the outside: metrics, training history, exit code and termination message."""
