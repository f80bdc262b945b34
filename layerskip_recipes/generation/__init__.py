"""`layerskip_generate` and the decoding engine. Imports checkpoint and the packages below it."""
