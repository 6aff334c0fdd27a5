"""Model folders on disk: headers checked first, tensors read lazily, shards written as a stream."""
