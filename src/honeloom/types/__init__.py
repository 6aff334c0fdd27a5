"""Frozen records that pass between stages: rows, plans, scores, reports."""
