"""Layouts of MoE checkpoints: the language, the tables, and the adapters that read safetensors and Orbax."""
