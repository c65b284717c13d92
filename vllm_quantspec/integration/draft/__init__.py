"""The draft: the target cloned with INT4 linears, and what keeps its weights true."""
