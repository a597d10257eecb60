"""Other libraries' models with their KV cache in the drive."""
