"""A lane: attention over the codewords of one or several flash channels."""
