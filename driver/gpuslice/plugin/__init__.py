"""The kubelet's side: a claim arrives by gRPC and waits for its turn; the driver prepares or unprepares it and answers."""
