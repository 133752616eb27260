"""Convert LoRA adapters on experts from any form to any other: plan, write, report."""
