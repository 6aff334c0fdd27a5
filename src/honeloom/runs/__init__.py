"""Run folders: atomic writes, keys, manifests, journals, locks, lineage. Knows no stage."""
