"""Training under the Hugging Face Trainer, with a full record of every run."""
