"""Base models: finding and loading them, and what stands on them (adapters, heads, roles, the forward pass)."""
