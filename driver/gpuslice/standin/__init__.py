"""A stand-in control plane for tests and the demo: API server over HTTPS, kubelet over gRPC, scheduler."""
