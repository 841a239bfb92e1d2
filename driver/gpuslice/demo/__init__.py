"""The stand-in control plane: an API server over HTTPS, a kubelet over gRPC, and the programs that use them."""
