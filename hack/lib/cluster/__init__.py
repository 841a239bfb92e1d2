"""A real Kubernetes of one node on this machine: `hack/cluster`. docs/cluster.md"""
