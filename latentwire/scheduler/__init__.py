"""Jobs: submitting them through submitit, running them, asking after them. submitit lives here."""
