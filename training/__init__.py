"""Making checkpoints: nano pre-training from scratch, and supervised fine-tuning on crop trajectories."""

if __name__ != "awares_bench.training":
    raise ImportError("import this room as awares_bench.training, after: pip install -e .")
