"""The pools of ResourceSlices of a node: their plan, the check against the API's limits, the comparison with the API."""
