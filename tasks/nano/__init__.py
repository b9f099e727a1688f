"""The nano suite: its renderer, its task files and its pictures."""
