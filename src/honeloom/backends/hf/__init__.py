"""Hugging Face: loading, rendering, scoring, hidden states, tuning."""
