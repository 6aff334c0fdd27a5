"""Measuring models: numbers with standard errors, and paired comparisons."""
