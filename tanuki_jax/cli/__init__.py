"""The command line: the process (`main`), the verbs, their flags (`parser`), a conversation (`chat`)."""
