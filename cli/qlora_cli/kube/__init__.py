"""The commands that speak to a cluster. Everything here reads API objects as they are, without the API's types.

A field that a newer operator added must not stop an older command line from listing jobs, and a command that only reads
starts sooner without building them.
"""
