"""The kubelet's side: a claim comes in over gRPC, waits for its turn, is prepared or unprepared, and is answered."""
