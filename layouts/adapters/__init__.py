"""LoRA adapters on experts: the forms in which A and B of gate, up and down are stored, and how a file says which one it is."""
