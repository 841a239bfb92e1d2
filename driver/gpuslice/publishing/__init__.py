"""The API server's side: what the node offers, kept published as ResourceSlices, with taints for what is not well."""
