"""Text on both sides of the decoding: prompts that come in, answers that go out."""
