"""The command line: one file for the verbs, one for their flags, one for a conversation."""
