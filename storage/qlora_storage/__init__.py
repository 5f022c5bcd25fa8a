"""Object storage, local folders and the Hugging Face Hub, for the trainer and for the command line. Has no torch."""
