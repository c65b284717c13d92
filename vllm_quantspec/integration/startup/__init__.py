"""From the name `quantspec` to an engine that may start: registration, flags, checks, and the hooks of a worker."""
