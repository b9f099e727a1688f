"""HTML galleries of a run's documents."""
