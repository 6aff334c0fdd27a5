"""How a merge is computed: planned tensor by tensor, read by pieces, summed in float64, rounded once."""
