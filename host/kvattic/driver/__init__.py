"""The driver: sequences, their jobs, the write path, and the queues that carry them."""
