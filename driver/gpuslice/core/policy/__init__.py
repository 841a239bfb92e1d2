"""What the operator lets each card offer: the policy document, its schema and its rules."""
