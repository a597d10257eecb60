"""From a command to a job: fetch, validate, load."""
