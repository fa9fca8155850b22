"""How the work of a step is laid over ranks and devices. Pure: no torch here."""
