"""The lmms-eval plugin, run folders and their records, sweeps and the demo."""
