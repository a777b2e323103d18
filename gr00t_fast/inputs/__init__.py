"""Pixels, joints and words to what a network reads, and its answer back to joint values."""
