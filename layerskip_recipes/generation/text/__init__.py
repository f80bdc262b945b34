"""Text around decoding: prompts and answers."""
