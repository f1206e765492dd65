"""petool-lite: fine-tune a small model to call the tool its user prefers, and run it offline on a CPU."""
