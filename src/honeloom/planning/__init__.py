"""What a job needs before it runs: memory, disk and time, from a model's config alone."""
