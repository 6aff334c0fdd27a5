"""A Flower app whose clients have LoRA adapters of different ranks."""
