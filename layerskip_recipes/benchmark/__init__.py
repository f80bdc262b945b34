"""`layerskip_benchmark` compares decoding methods. May import evaluation and the packages below it."""
