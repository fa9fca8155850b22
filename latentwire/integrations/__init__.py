"""Other people's tools, fed from the files of a run; each in a process of its own, which training never waits for."""
