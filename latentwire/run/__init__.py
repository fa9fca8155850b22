"""A run on disk: its directory, its attempts, its journals. Everything that meets another process meets it here."""
