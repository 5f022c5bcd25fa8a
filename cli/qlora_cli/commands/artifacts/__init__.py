"""Commands for what a job leaves: adapters, merged models, reports."""
