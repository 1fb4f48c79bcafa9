"""Speed and size, measured; each module prints a table and writes JSON on request."""
