"""Memory and work of a training or inference step on tensors without data, without a GPU. Needs torch."""
