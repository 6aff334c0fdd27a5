"""The report page and the model card. One file per panel."""
