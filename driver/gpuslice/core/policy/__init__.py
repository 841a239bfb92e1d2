"""The operator's policy for the offer of each card: the document, its schema and its rules."""
