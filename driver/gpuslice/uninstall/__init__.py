"""Removal of the driver from a cluster: the order of the steps on the cluster, and the clean-up of a node."""
