"""Files, processes and terminals: what the library needs of the operating system."""
