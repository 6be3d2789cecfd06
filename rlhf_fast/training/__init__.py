"""The pieces that every algorithm shares: configuration, experience, updates, checkpoints, the run folder."""
