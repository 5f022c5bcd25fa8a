"""Commands before a job: write, check, explain and plan a manifest."""
