"""What runs on an NVIDIA GPU: attention of a layer, prefill, and the hooks into model runner V2."""
