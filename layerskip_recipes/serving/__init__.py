"""`layerskip_serve`: an OpenAI-compatible HTTP server for one model. Imports generation and the packages below it."""
