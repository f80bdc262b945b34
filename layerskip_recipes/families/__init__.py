"""Models of Hugging Face folders: one file for each family. Imports model, folders and the packages below them."""
