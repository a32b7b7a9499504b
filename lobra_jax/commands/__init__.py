"""The commands of `lobra` that run, tokenize, plan and export; each imports what it needs when it runs."""
