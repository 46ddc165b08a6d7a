"""The verbs of the command line: each reads its flags and hands over. They know no model."""
