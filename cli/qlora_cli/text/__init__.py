"""Numbers, tables, YAML and output forms."""
