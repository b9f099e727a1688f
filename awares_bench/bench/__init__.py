"""Speed, measured beside what the engine replaces."""
