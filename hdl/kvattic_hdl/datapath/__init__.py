"""Arithmetic of a lane: products, scores, weights."""
