"""The HTTP port: metrics and probes for everybody, and a page about this node for a person on the node's loopback."""
