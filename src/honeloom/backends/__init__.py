"""The only importers of transformers, peft, datasets, lm_eval and the engines."""
