"""A node's pools of ResourceSlices: planned, checked against the API's limits, compared with what is published."""
