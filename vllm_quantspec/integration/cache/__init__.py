"""The hierarchical KV cache in vLLM: specs, managers, the exact window, the attention backend and its metadata."""
