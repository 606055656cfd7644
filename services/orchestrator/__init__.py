"""The chain of steps for one answer, the model providers, and the event log of each running answer. No HTTP, no SQL, no vectors."""
