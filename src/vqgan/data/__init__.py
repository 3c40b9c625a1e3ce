"""From files to batches of uint8 images, and from a tokenizer to stored codes."""
