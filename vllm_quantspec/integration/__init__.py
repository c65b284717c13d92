"""What plugs into vLLM, grouped by what changes together; docs/design.md has a table of all that is replaced in vLLM."""
