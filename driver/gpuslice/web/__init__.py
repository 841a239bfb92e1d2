"""The HTTP port: metrics and probes for every client, and a page about this node for a user on the node's loopback."""
