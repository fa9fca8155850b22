"""What a person sees of a run and of all runs, as plain data that becomes JSON; and the page that shows it.

The dashboard sends it to a browser as it changes, the report holds it as it was. Reads files only.
"""
