"""Plan a conversion from one format to the other: Hugging Face to MaxText, and back. Pure."""
