"""`layerskip_benchmark`: methods of decoding, measured in turns. Imports evaluation and the rooms below."""
