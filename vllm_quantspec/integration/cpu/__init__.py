"""What runs on the CPU engine: attention of a layer, the proposer, hooks into model runner V1, and repairs of vLLM."""
