"""What GGUF files say of a decoder: architectures, names, sizes, tokenizers, number types; no file is written here."""
