"""`layerskip_benchmark`: ways of decoding, measured in turns. Imports evaluation and what lies below."""
