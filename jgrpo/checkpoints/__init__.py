"""What is read from and written to disk: Hugging Face checkpoints and the state of a training run."""
