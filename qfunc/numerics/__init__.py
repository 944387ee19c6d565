"""The mathematics of quantization, as pure functions on tensors; nothing here knows of graphs or modules."""
