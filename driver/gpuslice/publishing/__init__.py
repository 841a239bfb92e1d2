"""The API server's side: publishes the node's offer as ResourceSlices, with taints for unavailable devices."""
