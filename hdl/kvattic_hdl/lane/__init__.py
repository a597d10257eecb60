"""A lane: attention over the codewords of one flash channel."""
