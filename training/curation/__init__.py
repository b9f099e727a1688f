"""Questions and pictures to labelled trajectories, and the diagnosis of what a model learned from them."""
