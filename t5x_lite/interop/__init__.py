"""Checkpoints of other programs: what theirs hold, under our names, and the way back."""
