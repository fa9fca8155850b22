"""The training side: agent, ranks, the one loop, and what a checkpoint holds. torch lives here."""
