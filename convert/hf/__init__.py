"""Write Hugging Face checkpoints: shards, index, config, side files."""
