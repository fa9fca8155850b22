"""Checkpoints: committed or invisible, verified by SHA-256, rotated. Knows bytes and JSON, not torch.

The public face is :class:`latentwire.checkpoint.manager.CheckpointManager`.
"""
