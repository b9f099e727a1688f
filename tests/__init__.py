"""Tests. PyTorch is loaded with the policy that the command line sets."""

from awares_bench.openmp import set_short_spin

set_short_spin()
