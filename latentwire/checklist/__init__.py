"""Claims that prove themselves: the drill, and the items of CHECKLIST.md."""
