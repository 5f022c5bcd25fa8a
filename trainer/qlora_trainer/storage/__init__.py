"""Read and write object storage, local folders and the Hugging Face Hub. Imports no torch."""
