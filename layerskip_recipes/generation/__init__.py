"""`layerskip_generate` and the decoding engine. Imports checkpoint and what lies below."""
