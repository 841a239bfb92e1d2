"""`hack/cluster`: a real Kubernetes of one node on this machine. See docs/cluster.md."""
