"""Configuration: what the options are, where values come from, which combinations work."""
