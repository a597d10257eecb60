"""Which tokens a sparse job attends."""
