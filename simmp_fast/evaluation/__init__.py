"""Evaluation: surface metrics, the two protocols, inference over slices, tables, and prediction of new files."""
